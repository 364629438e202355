"""Tables of runs: who stands where, which average it is, and what is said to be measured."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest

from vlprompt.classification.protocols import across, base_to_new, coop_fewshot, elevater
from vlprompt.classification.tables import protocol_table
from vlprompt.core.errors import DataError
from vlprompt.experiments.statistics import harmonic_mean
from vlprompt.experiments.tables import Row

FACTS: dict[str, Any] = {
    "backbone": "tiny",
    "backbone_fingerprint": {"id": "abc"},
    "vlprompt": "0.1.0",
    "seeds": [1, 2],
}


def metrics(result: Any, learner: str, data: Any, shots: list[int], **more: Any) -> dict[str, Any]:
    return {
        **result.metrics, "protocol": result.protocol, "learner": learner, "data": data, "shots": shots, **FACTS, **more
    }  # fmt: skip


def cross(learner: str, gain: float, targets: tuple[str, ...] = ("x", "y")) -> dict[str, Any]:
    def run(cell: Any) -> dict[str, float]:
        zero = {None: 0.6, "x": 0.5, "y": 0.25}[cell.target]
        return {"score": zero + gain + 0.01 * cell.seed, "zero_shot_score": zero}

    result = across("cross-dataset", "s", list(targets), run, seeds=(1, 2))
    return metrics(result, learner, "s", [16], targets=list(targets))


def test_cross_dataset_has_the_source_first_and_the_average_without_it() -> None:
    table = protocol_table([cross("coop", 0.1), cross("maple", 0.2)])
    lines = table.markdown().splitlines()
    assert lines[0] == "| method (%) | s (source) | x | y | average |"
    assert lines[2] == "| zero-shot | 60.0 | 50.0 | 25.0 | 37.5 |"
    assert lines[3].startswith("| coop | 71.5 ± ")
    assert [row.method for row in table.rows] == ["zero-shot", "coop", "maple"]
    assert lines[4].split("|")[5].strip().startswith("**59.0 ± ")  # (0.715 + 0.465) / 2
    assert "Measured with vlprompt 0.1.0: cross-dataset; 16 shots; 2 seeds" in lines[-1]


def test_base_to_new_averages_the_harmonic_mean_of_averages() -> None:
    numbers = {"a": (0.9, 0.1), "b": (0.5, 0.5)}

    def run(cell: Any) -> dict[str, float]:
        base, new = numbers[cell.dataset]
        zero = {"base/zero_shot_accuracy": 0.4, "new/zero_shot_accuracy": 0.6}
        return {"base/accuracy": base, "new/accuracy": new, **zero}

    result = base_to_new(["a", "b"], lambda _: 4, run, seeds=(1, 2))
    table = protocol_table([metrics(result, "coop", ["a", "b"], [16])])
    ours = {c: round(100 * v.mean, 2) for c, v in table.rows[1].values.items()}  # type: ignore[union-attr]
    assert ours["a H"] == 18.0
    assert ours["b H"] == 50.0
    assert ours["average H"] == round(100 * harmonic_mean(0.7, 0.3), 2) != (18.0 + 50.0) / 2
    zero = {c: v.mean for c, v in table.rows[0].values.items()}  # type: ignore[union-attr]
    assert zero["average H"] == pytest.approx(harmonic_mean(0.4, 0.6))
    assert table.columns[-3:] == ["average base", "average new", "average H"]


def test_few_shot_tables_have_a_line_per_number_of_shots() -> None:
    def run(cell: Any) -> dict[str, float]:
        value = cell.shots / 100 + (0.5 if cell.dataset == "a" else 0.3)
        return {"accuracy": value, "zero_shot_accuracy": 0.2, "score": value, "zero_shot_score": 0.1}

    few = coop_fewshot(["a", "b"], run, shots=(1, 16), seeds=(1, 2))
    lines = protocol_table([metrics(few, "coop", ["a", "b"], [1, 16])]).markdown().splitlines()
    assert lines[2] == "| zero-shot | 20.0 | 20.0 | 20.0 |"
    assert lines[4] == "| coop 16-shot | **66.0 ± 0.0** | **46.0 ± 0.0** | **56.0 ± 0.0** |"
    measured = metrics(elevater(["a", "b"], run, shots=(5,), seeds=(1, 2)), "coop", ["a", "b"], [5])
    text = protocol_table([{**measured, "a/metric": "map_11_point", "b/metric": "accuracy"}]).markdown()
    assert "| zero-shot | 10.0 | 10.0 | 10.0 |" in text
    assert "a by map_11_point" in text
    assert "b by" not in text


def test_a_missing_target_leaves_a_gap_and_no_average() -> None:
    def run(cell: Any) -> dict[str, float]:
        if cell.target == "y":
            raise DataError("gone")
        return {"score": 0.5, "zero_shot_score": 0.4}

    result = across("cross-dataset", "s", ["x", "y"], run, seeds=(1, 2))
    table = protocol_table([metrics(result, "coop", "s", [16], targets=["x", "y"])])
    assert table.columns == ["s (source)", "x"]
    assert "2 runs failed and are missing" in table.note


def test_published_rows_are_marked(tmp_path: Path) -> None:
    theirs = Row("CoOp", {"x": 0.63, "average": 0.63}, source="published", citation="somebody 2022")
    table = protocol_table([cross("coop", 0.1)], [theirs])
    assert "| CoOp † |" in table.markdown()
    assert "† published (somebody 2022); all other rows are measured with this code." in table.markdown()
    paths = table.write(tmp_path)
    assert [p.name for p in paths] == ["table.md", "table.csv", "table.tex"]
    rows = list(csv.DictReader(io.StringIO(paths[1].read_text())))
    assert [r["source"] for r in rows] == ["measured", "measured", "published"]
    assert float(rows[0]["average"]) == 37.5
    assert paths[2].read_text().startswith("% Measured with")
    assert r"\end{tabular}" in paths[2].read_text()


def test_runs_of_several_protocols_are_no_table() -> None:
    other = {**cross("coop", 0.1), "protocol": "domain-generalisation"}
    with pytest.raises(DataError, match="one protocol; got cross-dataset, domain-generalisation"):
        protocol_table([cross("coop", 0.1), other])
    with pytest.raises(DataError, match="got no runs"):
        protocol_table([])
    with pytest.raises(DataError, match="transfer has no table of methods"):
        protocol_table([{**cross("coop", 0.1), "protocol": "transfer"}])
