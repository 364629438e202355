"""Tables of protocols, as papers print them: one line per method, a column per data set, then the average.

What a run's ``metrics.json`` holds goes in, so tables are made of finished runs and of nothing else. Averages are those
of the protocol: over targets without the source, and for base-to-new the harmonic mean of the two averages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlprompt.core.errors import DataError
from vlprompt.core.files import write_text
from vlprompt.experiments.statistics import Summary, harmonic_mean
from vlprompt.experiments.tables import Row, to_csv, to_latex, to_markdown

__all__ = ["ProtocolTable", "protocol_table"]

Metrics = Mapping[str, Any]
AVERAGE = "average"


@dataclass(frozen=True)
class ProtocolTable:
    """Rows and columns of one protocol, and the sentence below them that says what was measured and how.

    Attributes:
        rows: Zero-shot first where it was measured too, then the methods.
        columns: In order.
        note: Protocol, measures, seeds and backbone.
    """

    rows: list[Row]
    columns: list[str]
    note: str

    def markdown(self) -> str:
        """Return the table as Markdown, the note below."""
        return f"{to_markdown(self.rows, self.columns)}\n{self.note}\n"

    def csv(self) -> str:
        """Return the table as CSV with full precision; the note goes without."""
        return to_csv(self.rows, self.columns)

    def latex(self) -> str:
        """Return the table as LaTeX, the note as a comment."""
        return f"% {self.note}\n{to_latex(self.rows, self.columns)}"

    def write(self, folder: Path) -> list[Path]:
        """Write ``table.md``, ``table.csv`` and ``table.tex``; return their paths."""
        texts = {"table.md": self.markdown(), "table.csv": self.csv(), "table.tex": self.latex()}
        for name, text in texts.items():
            write_text(folder / name, text)
        return [folder / name for name in texts]


def protocol_table(runs: Sequence[Metrics], published: Sequence[Row] = ()) -> ProtocolTable:
    """Return the table of one protocol over one or several finished runs.

    Args:
        runs: Contents of ``metrics.json``, all of one protocol.
        published: Rows of others to stand beside them, marked as theirs.

    Raises:
        DataError: If there are no runs, they are of several protocols, or of one that has no such table.
    """
    names = list(dict.fromkeys(str(run.get("protocol")) for run in runs))
    if len(names) != 1:
        raise DataError(f"a table shows one protocol; got {', '.join(names) or 'no runs'}.")
    if names[0] not in _LINES:
        raise DataError(f"{names[0]} has no table of methods; those that have: {', '.join(_LINES)}.")
    rows: list[Row] = []
    for run in runs:
        lines = _LINES[names[0]](run)
        # Zero-shot is the same in every run: the first one says it.
        rows += [
            row for row in lines if row.method != "zero-shot" or row.method not in [r.method for r in rows]
        ]
    rows += published
    columns = list(dict.fromkeys(column for row in rows for column in row.values))
    columns.sort(key=lambda c: c.startswith(AVERAGE))  # stable: averages last
    return ProtocolTable(rows, columns, _note(runs, names[0]))


def _few_shot(run: Metrics) -> list[Row]:
    """Rows ``zero-shot`` and ``<learner> <k>-shot``."""
    measure = "score" if run["protocol"] == "elevater" else "accuracy"
    rows = [Row("zero-shot", _values(run, f"shots{run['shots'][0]}/zero_shot_{measure}", spread=False))]
    for k in run["shots"]:
        rows.append(Row(f"{run['learner']} {k}-shot", _values(run, f"shots{k}/{measure}")))
    return [row for row in rows if row.values]


def _across(run: Metrics) -> list[Row]:
    """Rows ``zero-shot`` and the learner; the source's column comes first, the average leaves it out."""
    rows = []
    source = f"{run['data']} (source)" if isinstance(run["data"], str) else "sources, each on itself"
    for method, key, spread in (("zero-shot", "zero_shot_score", False), (run["learner"], "score", True)):
        values = {source: _summary(run, f"source/{key}", spread)}
        values |= {t: _summary(run, f"{t}/{key}", spread) for t in run["targets"]}
        rows.append(Row(str(method), _known({**values, AVERAGE: _summary(run, key, spread)})))
    return rows


def _base_to_new(run: Metrics) -> list[Row]:
    """Base, new and harmonic mean of every data set, then of the averages."""
    several = len(_datasets(run)) > 1
    rows = []
    for method, key, spread in (
        ("zero-shot", "zero_shot_accuracy", False),
        (run["learner"], "accuracy", True),
    ):
        values: dict[str, Summary | None] = {}
        for name in [*(_datasets(run) if several else []), ""]:
            prefix, label = (f"{name}/", name) if name else ("", AVERAGE if several else _datasets(run)[0])
            base, new = (_summary(run, f"{prefix}{part}/{key}", spread) for part in ("base", "new"))
            mean = _summary(run, f"{prefix}harmonic_mean", spread) if spread else None
            if base is not None and new is not None and mean is None:
                mean = Summary(harmonic_mean(base.mean, new.mean), None, None, 1)
            values |= {f"{label} base": base, f"{label} new": new, f"{label} H": mean}
        rows.append(Row(str(method), _known(values)))
    return rows


_LINES = {
    "coop-fewshot": _few_shot,
    "elevater": _few_shot,
    "cross-dataset": _across,
    "domain-generalisation": _across,
    "base-to-new": _base_to_new,
}


def _datasets(run: Metrics) -> list[str]:
    return [run["data"]] if isinstance(run["data"], str) else list(run["data"])


def _values(run: Metrics, key: str, spread: bool = True) -> dict[str, float | Summary]:
    """Return a value per data set and their average; of a single data set only itself."""
    names = _datasets(run)
    if len(names) == 1:
        return _known({names[0]: _summary(run, key, spread)})
    return _known(
        {**{n: _summary(run, f"{n}/{key}", spread) for n in names}, AVERAGE: _summary(run, key, spread)}
    )


def _summary(run: Metrics, key: str, spread: bool) -> Summary | None:
    """Return a number of the run, with its interval over seeds if it depends on them; None if it isn't there."""
    if key not in run:
        return None
    return Summary(run[key], None, run.get(f"{key}_ci95") if spread else None, len(run["seeds"]))


def _known(values: Mapping[str, Summary | None]) -> dict[str, float | Summary]:
    return {column: value for column, value in values.items() if value is not None}


def _note(runs: Sequence[Metrics], protocol: str) -> str:
    """Say what the measured rows are: protocol, shots, seeds, backbone, and measures other than accuracy."""
    backbones = dict.fromkeys(f"{r['backbone']} ({r['backbone_fingerprint']['id']})" for r in runs)
    shots = dict.fromkeys("/".join(map(str, r["shots"])) for r in runs)
    seeds = dict.fromkeys(len(r["seeds"]) for r in runs)
    failed = sum(int(r.get("runs_failed", 0)) for r in runs)
    measures = {
        k.removesuffix("/metric"): v
        for r in runs
        for k, v in r.items()
        if k.endswith("/metric") and v != "accuracy"
    }
    parts = [
        f"Measured with vlprompt {', '.join(dict.fromkeys(str(r.get('vlprompt', '?')) for r in runs))}: {protocol}",
        f"{', '.join(shots)} shots",
        f"{', '.join(map(str, seeds))} seeds (mean ± 95 % interval)",
        f"backbone {', '.join(backbones)}",
    ]
    parts += [f"{name} by {metric}" for name, metric in measures.items() if protocol != "coop-fewshot"]
    parts += [f"{failed} runs failed and are missing"] if failed else []
    return "; ".join(parts) + "."
