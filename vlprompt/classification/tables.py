"""Tables of classification, as papers print them: a line per method, a column per data set, then the average.

Averages are those of the protocol: over targets without the source, and for base-to-new the harmonic mean of the two
averages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vlprompt.classification.config import Study
from vlprompt.classification.distil import TRANSDUCTIVE
from vlprompt.classification.protocols import protocol_of
from vlprompt.experiments.layout import AVERAGE, Layout, gain_tables
from vlprompt.experiments.results import Results
from vlprompt.experiments.statistics import Summary
from vlprompt.experiments.tables import Row, Table

__all__ = ["protocol_tables"]


def protocol_tables(
    results: Results,
    studies: Sequence[Study],
    title: str = "",
    baselines: Mapping[str, tuple[str, ...]] | None = None,
    published: Sequence[Row] = (),
) -> list[Table]:
    """Return the table of one protocol over one or several learners, then their paired gains.

    Args:
        results: Lines of all of them.
        studies: One for each learner, all of one protocol.
        title: What stands above the tables.
        baselines: Method to the methods that its gains are over.
        published: Rows of others to stand beside them, marked as theirs.
    """
    protocol = protocol_of(studies[0].config.protocol.name)
    rows = _rows(results, studies)
    if not rows:
        return []

    rows.sort(key=lambda row: not row.method.startswith("zero-shot"))  # stable: zero-shot first
    rows += published
    columns = list(dict.fromkeys(column for row in rows for column in row.values))
    if len({tuple(sorted(study.config.data.names)) for study in studies}) > 1:
        # Averages over different data sets do not compare.
        columns = [column for column in columns if not column.startswith(AVERAGE)]
    columns.sort(key=lambda column: column.startswith(AVERAGE))  # stable: averages last
    tables = [Table(rows, columns, title, _note(studies, results))]

    if baselines:
        layout = Layout("", protocol.metric, columns=("data", "shots"), baselines=baselines)
        tables += gain_tables(protocol.comparable(results), layout, title)

    return tables


def _rows(results: Results, studies: Sequence[Study]) -> list[Row]:
    """Return the measured rows; zero-shot on one backbone is the same whatever is learned, and is said once."""
    protocol = protocol_of(studies[0].config.protocol.name)
    rows: dict[str, Row] = {}

    for study in studies:
        for row in protocol.rows(results.select(method=study.method), study):
            name = _row_name(row, study, studies)
            if name in rows and _contradicts(row, rows[name]):
                name = f"{name} ({study.method})"  # other sentences, for example
            earlier = rows[name].values if name in rows else {}
            further = {column: value for column, value in row.values.items() if column not in earlier}
            rows[name] = Row(name, earlier | further)

    return list(rows.values())


def _contradicts(row: Row, other: Row) -> bool:
    """Return whether two rows differ, as they are written, in a column that both have."""
    return any(
        _written(row.values[column]) != _written(other.values[column])
        for column in row.values.keys() & other.values.keys()
        if not column.startswith(AVERAGE)
    )


def _written(value: float | Summary) -> str:
    return f"{100 * (value.mean if isinstance(value, Summary) else value):.1f}"


def _row_name(row: Row, study: Study, studies: Sequence[Study]) -> str:
    """Return the name of a row.

    Where backbones differ, zero-shot rows say on which they are; a learner that saw unlabelled images says so.
    """
    backbones = {other.config.backbone.name for other in studies}
    if row.method == "zero-shot" and len(backbones) > 1:
        return f"zero-shot ({study.config.backbone.name})"
    if row.method == study.method and study.config.distil.teacher:
        return f"{row.method} ({TRANSDUCTIVE})"
    return row.method


def _note(studies: Sequence[Study], results: Results) -> str:
    """Say what the measured rows are: protocol, shots, seeds, backbone, other measures than accuracy, what failed."""
    config = studies[0].config
    backbones = dict.fromkeys(
        "/".join(filter(None, (study.config.backbone.name, study.config.backbone.pretrained)))
        for study in studies
    )
    shots = "/".join(map(str, sorted({k for study in studies for k in study.config.protocol.shots})))
    counts = sorted({len(study.config.protocol.seeds) for study in studies})
    seeds = "1 seed" if counts == [1] else f"{' or '.join(map(str, counts))} seeds"
    repeated = seeds if counts == [1] else f"{seeds} (mean ± 95 % interval)"
    what = config.protocol.split if config.protocol.name == "class-incremental" else f"{shots} shots"
    parts = [config.protocol.name, what, repeated, f"backbone {', '.join(backbones)}"]

    for line in results.select("score", measure=lambda measure: measure is not None).lines:
        name = line.where.get("target") or line.where.get("data")
        parts.append(f"{name} by {line.where['measure']}")

    students = [study.method for study in studies if study.config.distil.teacher]
    if students:
        parts.append(
            f"{', '.join(students)}: {TRANSDUCTIVE}, learned from all training images without labels"
        )

    if lost := _count_lost(studies, results):
        parts.append(f"{lost} cells failed and are missing")
    return "; ".join(dict.fromkeys(parts)) + "."


def _count_lost(studies: Sequence[Study], results: Results) -> int:
    """Return how many planned cells left no line."""
    lost = 0
    for study in studies:
        for cell in protocol_of(study.config.protocol.name).planned(study):
            where = {"target": None, "stage": None, **cell.where}
            lost += not results.select(**where)
    return lost
