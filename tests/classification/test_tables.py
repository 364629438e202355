"""Tables of classification: who stands where, which average it is, and what is said to be measured."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from tests.classification.studies import measured, study
from vlprompt.classification.config import Study
from vlprompt.classification.tables import protocol_tables
from vlprompt.experiments.cell import Cell
from vlprompt.experiments.results import Results
from vlprompt.experiments.statistics import harmonic_mean
from vlprompt.experiments.tables import Row, Table, write_tables

CROSS = {"name": "cross-dataset", "shots": [16], "seeds": [1, 2], "targets": ["scenes/size", "scenes/count"]}
Measure = Callable[[Cell], Mapping[str, float] | None]


def cross(method: str, gain: float) -> tuple[Study, Results]:
    def measure(cell: Cell) -> dict[str, float]:
        zero = {None: 0.6, "scenes/size": 0.5, "scenes/count": 0.25}[cell.get("target")]
        return {"score": zero + gain + 0.01 * cell["seed"], "zero_shot_score": zero}

    planned = study(CROSS, ["digits"], method)
    return planned, measured(planned, measure)


def tables(
    *studies: tuple[Study, Results], published: Sequence[Row] = (), **baselines: tuple[str, ...]
) -> list[Table]:
    results = Results()
    for _, own in studies:
        results = results + own
    return protocol_tables(results, [planned for planned, _ in studies], "", baselines, published)


def test_cross_dataset_has_the_source_first_and_the_average_without_it() -> None:
    (table,) = tables(cross("coop", 0.1), cross("maple", 0.2))
    lines = table.markdown().splitlines()
    assert lines[0] == "| method (%) | digits (source) | scenes/size | scenes/count | average |"
    assert lines[2] == "| zero-shot | 60.0 | 50.0 | 25.0 | 37.5 |"
    assert lines[3].startswith("| coop | 71.5 ± ")
    assert [row.method for row in table.rows] == ["zero-shot", "coop", "maple"]
    assert lines[4].split("|")[5].strip().startswith("**59.0 ± ")  # (0.715 + 0.465) / 2
    assert "cross-dataset; 16 shots; 2 seeds (mean ± 95 % interval); backbone tiny." in lines[-1]


def test_gains_over_targets_are_paired() -> None:
    _, gains = tables(cross("coop", 0.1), cross("maple", 0.2), maple=("coop",))
    assert gains.title.startswith("Gain over coop")
    values = gains.rows[0].values
    assert values["digits on scenes/size, 16 shots"].mean == pytest.approx(0.1)  # type: ignore[union-attr]
    assert values["average over seeds, 16 shots"].ci95 == pytest.approx(0, abs=1e-9)  # type: ignore[union-attr]
    assert "average over data sets, 16 shots" in values


def test_base_to_new_averages_the_harmonic_mean_of_averages() -> None:
    numbers = {"digits": (0.9, 0.1), "scenes/kind": (0.5, 0.5)}

    def measure(cell: Cell) -> dict[str, float]:
        base, new = numbers[cell["data"]]
        zero = {"base/zero_shot_accuracy": 0.4, "new/zero_shot_accuracy": 0.6}
        return {"base/accuracy": base, "new/accuracy": new, "harmonic_mean": harmonic_mean(base, new), **zero}

    planned = study({"name": "base-to-new", "seeds": [1, 2]}, list(numbers))
    (table,) = tables((planned, measured(planned, measure)))
    ours = {column: round(100 * value.mean, 2) for column, value in table.rows[1].values.items()}  # type: ignore[union-attr]
    assert ours["digits H"] == 18.0
    assert ours["scenes/kind H"] == 50.0
    assert ours["average H"] == round(100 * harmonic_mean(0.7, 0.3), 2) != (18.0 + 50.0) / 2
    zero = {column: value.mean for column, value in table.rows[0].values.items()}  # type: ignore[union-attr]
    assert zero["average H"] == pytest.approx(harmonic_mean(0.4, 0.6))
    assert table.columns[-3:] == ["average base", "average new", "average H"]


def test_few_shot_tables_have_a_line_per_number_of_shots() -> None:
    def measure(cell: Cell) -> dict[str, float]:
        value = cell["shots"] / 100 + (0.5 if cell["data"] == "digits" else 0.3)
        return {"accuracy": value, "zero_shot_accuracy": 0.2, "score": value, "zero_shot_score": 0.1}

    planned = study({"shots": [1, 16], "seeds": [1, 2]}, ["digits", "scenes/kind"])
    lines = tables((planned, measured(planned, measure)))[0].markdown().splitlines()
    assert lines[2] == "| zero-shot | 20.0 | 20.0 | 20.0 |"
    assert lines[4] == "| coop 16-shot | **66.0 ± 0.0** | **46.0 ± 0.0** | **56.0 ± 0.0** |"
    planned = study({"name": "elevater", "shots": [5], "seeds": [1, 2]}, ["digits", "scenes/kind"])
    text = tables((planned, measured(planned, measure)))[0].markdown()
    assert "| zero-shot | 10.0 | 10.0 | 10.0 |" in text


def test_a_missing_target_leaves_a_gap_and_no_average() -> None:
    def measure(cell: Cell) -> dict[str, float] | None:
        return None if cell.get("target") == "scenes/count" else {"score": 0.5, "zero_shot_score": 0.4}

    planned = study(CROSS, ["digits"])
    (table,) = tables((planned, measured(planned, measure)))
    assert table.columns == ["digits (source)", "scenes/size"]
    assert "2 cells failed and are missing" in table.note


def test_published_rows_are_marked(tmp_path: Path) -> None:
    theirs = Row("CoOp", {"scenes/size": 0.63, "average": 0.63}, source="published", citation="somebody 2022")
    (table,) = tables(cross("coop", 0.1), published=[theirs])
    assert "| CoOp † |" in table.markdown()
    assert "† published (somebody 2022); all other rows are measured with this code." in table.markdown()
    paths = write_tables(tmp_path, [table])
    assert [path.name for path in paths] == ["table.md", "table.csv", "table.tex"]
    rows = list(csv.DictReader(io.StringIO(paths[1].read_text())))
    assert [row["source"] for row in rows] == ["measured", "measured", "published"]
    assert float(rows[0]["average"]) == 37.5
    assert paths[2].read_text().startswith("% cross-dataset")
    assert r"\end{tabular}" in paths[2].read_text()
