"""Protocols: what is run, what comes out, and what a failing cell costs."""

from __future__ import annotations

import json

import pytest

from vlprompt.errors import DataError
from vlprompt.evaluation.protocols import Cell, base_to_new, coop_fewshot, split_base_new
from vlprompt.evaluation.statistics import harmonic_mean, summarise


def rising(cell: Cell) -> dict[str, float]:
    return {"accuracy": 0.5 + 0.02 * cell.shots + 0.01 * cell.seed, "nll": 1.0 / cell.shots}


def test_fewshot_on_one_data_set() -> None:
    result = coop_fewshot(["digits"], rising, shots=(1, 16), seeds=(1, 2, 3))
    spread = summarise([0.01, 0.02, 0.03])
    assert result.metrics["shots1/accuracy"] == pytest.approx(0.54)
    assert result.metrics["shots16/accuracy"] == result.metrics["accuracy"] == pytest.approx(0.84)
    assert result.metrics["accuracy_std"] == pytest.approx(spread.std)
    assert result.metrics["shots1/accuracy_ci95"] == pytest.approx(spread.ci95)
    assert result.metrics["shots16/nll"] == pytest.approx(1 / 16)
    assert (result.metrics["runs"], result.metrics["runs_failed"], result.exit_code) == (6, 0, 0)
    assert not any(key.startswith("digits/") for key in result.metrics)


def test_fewshot_over_data_sets_averages_each_seed() -> None:
    def opposite(cell: Cell) -> dict[str, float]:
        return {"accuracy": 0.5 + (0.1 if cell.dataset == "a" else -0.1) * cell.seed}

    metrics = coop_fewshot(["a", "b"], opposite, shots=(4,), seeds=(1, 2)).metrics
    assert metrics["a/shots4/accuracy"] == pytest.approx(0.65)
    assert metrics["b/shots4/accuracy"] == pytest.approx(0.35)
    assert metrics["accuracy"] == pytest.approx(0.5)
    assert metrics["accuracy_std"] == pytest.approx(0.0)  # the data sets' swings cancel within a seed


def test_a_failing_cell_is_reported_and_the_others_survive() -> None:
    def breaks(cell: Cell) -> dict[str, float]:
        if (cell.dataset, cell.seed) == ("b", 2):
            raise DataError("b: class 3 has 0 images.")
        return {"accuracy": 0.9 if cell.dataset == "a" and cell.seed == 2 else 0.5}

    result = coop_fewshot(["a", "b"], breaks, shots=(1,), seeds=(1, 2, 3))
    assert result.exit_code == 1
    assert [f.cell.name for f in result.failures] == ["b_1shots_seed2"]
    assert result.failures[0].message == "b: class 3 has 0 images."
    assert "in breaks" in result.failures[0].stack
    assert result.metrics["a/shots1/accuracy"] == pytest.approx((0.5 + 0.9 + 0.5) / 3)
    assert result.metrics["accuracy"] == pytest.approx(
        0.5
    )  # seed 2 lacks b, so it is left out of the average
    assert result.metrics["runs_failed"] == 1
    stored = json.loads(json.dumps(result.record()))
    assert len(stored["cells"]) == 5
    assert stored["failures"][0]["seed"] == 2


def test_all_cells_failing_is_still_a_result() -> None:
    def never(cell: Cell) -> dict[str, float]:
        raise RuntimeError

    result = coop_fewshot(["a"], never, shots=(1,), seeds=(1, 2))
    assert result.metrics == {"runs": 2, "runs_failed": 2}
    assert result.failures[0].message == "RuntimeError"


def test_base_to_new_trains_on_the_first_half() -> None:
    seen: list[Cell] = []

    def run(cell: Cell) -> dict[str, float]:
        seen.append(cell)
        return {"base/accuracy": 0.8 + 0.01 * cell.seed, "new/accuracy": 0.4}

    result = base_to_new({"digits": 5}, run, shots=16, seeds=(1, 2))
    assert (seen[0].base, seen[0].new) == ((0, 1, 2), (3, 4))
    assert result.metrics["base/accuracy"] == pytest.approx(0.815)
    assert result.metrics[result.headline] == pytest.approx(harmonic_mean(0.815, 0.4))
    by_seed = summarise([harmonic_mean(0.81, 0.4), harmonic_mean(0.82, 0.4)])
    assert result.metrics["harmonic_mean_ci95"] == pytest.approx(by_seed.ci95)


def test_base_to_new_average_is_the_harmonic_mean_of_averages() -> None:
    table = {
        "a": {"base/accuracy": 0.9, "new/accuracy": 0.1},
        "b": {"base/accuracy": 0.5, "new/accuracy": 0.5},
    }
    metrics = base_to_new({"a": 4, "b": 4}, lambda cell: table[cell.dataset], seeds=(1,)).metrics
    assert metrics["a/harmonic_mean"] == pytest.approx(0.18)
    assert metrics["b/harmonic_mean"] == pytest.approx(0.5)
    assert metrics["harmonic_mean"] == pytest.approx(harmonic_mean(0.7, 0.3))


def test_split_base_new_gives_the_odd_class_to_base() -> None:
    assert split_base_new(4) == ((0, 1), (2, 3))
    assert split_base_new(3) == ((0, 1), (2,))
    with pytest.raises(DataError, match="at least 2 classes, got 1"):
        split_base_new(1)
