"""Protocols: what is run, what comes out, and what a failing cell costs."""

from __future__ import annotations

import json

import pytest

from vlprompt.classification.protocols import (
    Cell,
    across,
    base_to_new,
    coop_fewshot,
    elevater,
    split_base_new,
)
from vlprompt.core.errors import DataError
from vlprompt.experiments.statistics import harmonic_mean, summarise


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

    result = base_to_new(["digits"], lambda _: 5, run, shots=16, seeds=(1, 2))
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
    metrics = base_to_new(["a", "b"], lambda _: 4, lambda cell: table[cell.dataset], seeds=(1,)).metrics
    assert metrics["a/harmonic_mean"] == pytest.approx(0.18)
    assert metrics["b/harmonic_mean"] == pytest.approx(0.5)
    assert metrics["harmonic_mean"] == pytest.approx(harmonic_mean(0.7, 0.3))


def test_split_base_new_gives_the_odd_class_to_base() -> None:
    assert split_base_new(4) == ((0, 1), (2, 3))
    assert split_base_new(3) == ((0, 1), (2,))
    with pytest.raises(DataError, match="at least 2 classes, got 1"):
        split_base_new(1)


def test_base_to_new_survives_a_data_set_that_cannot_be_counted() -> None:
    def count(name: str) -> int:
        if name == "b":
            raise DataError("b: there is no folder.")
        return 4

    result = base_to_new(
        ["a", "b"], count, lambda _: {"base/accuracy": 0.8, "new/accuracy": 0.4}, seeds=(1, 2)
    )
    assert [(f.cell.dataset, f.message) for f in result.failures] == [("b", "b: there is no folder.")] * 2
    assert result.metrics["a/harmonic_mean"] == pytest.approx(harmonic_mean(0.8, 0.4))
    assert "harmonic_mean" not in result.metrics  # an average over fewer data sets is another number


def test_across_trains_once_and_averages_the_targets() -> None:
    seen: list[Cell] = []

    def run(cell: Cell) -> dict[str, float]:
        seen.append(cell)
        value = {"x": 0.4, "y": 0.6, None: 0.9}[cell.target] + 0.01 * cell.seed
        return {"score": value, "accuracy": value - 0.1, "zero_shot_score": 0.3}

    result = across("cross-dataset", "s", ["x", "y"], run, shots=16, seeds=(1, 2))
    assert [(c.target, c.seed) for c in seen] == [
        (None, 1),
        ("x", 1),
        ("y", 1),
        (None, 2),
        ("x", 2),
        ("y", 2),
    ]
    assert len({c.name for c in seen}) == 6
    assert result.headline == "score"
    assert result.metrics["source/score"] == pytest.approx(0.915)
    assert result.metrics["x/score"] == pytest.approx(0.415)
    assert result.metrics["score"] == pytest.approx(0.515)  # of the targets, without the source
    assert result.metrics["score_ci95"] == pytest.approx(summarise([0.51, 0.52]).ci95)
    assert result.metrics["accuracy"] == pytest.approx(0.415)
    assert result.metrics["zero_shot_score"] == pytest.approx(0.3)


def test_across_several_sources_averages_over_them_and_scores_none_on_itself() -> None:
    values = {("s", None): 0.9, ("x", None): 0.7, ("s", "x"): 0.4, ("s", "y"): 0.6, ("x", "y"): 0.2}
    result = across(
        "cross-dataset", ["s", "x"], ["x", "y"], lambda c: {"score": values[c.dataset, c.target]}, seeds=(1,)
    )
    assert len(result.cells) == len(values)
    assert result.metrics["source/score"] == pytest.approx(0.8)
    assert result.metrics["x/score"] == pytest.approx(0.4)
    assert result.metrics["y/score"] == pytest.approx(0.4)
    assert result.metrics["score"] == pytest.approx(0.4)


def test_across_survives_a_target_and_leaves_its_average_out() -> None:
    def run(cell: Cell) -> dict[str, float]:
        if cell.target == "y":
            raise DataError("y is not there.")
        return {"score": 0.5}

    result = across("cross-dataset", "s", ["x", "y"], run, seeds=(1,))
    assert (result.exit_code, [f.cell.name for f in result.failures]) == (1, ["s_16shots_seed1_on_y"])
    assert result.metrics["x/score"] == result.metrics["source/score"] == 0.5
    assert "score" not in result.metrics


def test_elevater_is_the_mean_of_each_data_sets_own_measure() -> None:
    own = {"voc": "map_11_point", "digits": "accuracy", "memes": "roc_auc"}

    def run(cell: Cell) -> dict[str, float]:
        value = {"voc": 0.8, "digits": 0.9, "memes": 0.4}[cell.dataset] + cell.shots / 1000
        return {"accuracy": 0.5, own[cell.dataset]: value, "score": value}

    result = elevater(list(own), run, shots=(5, 20), seeds=(1, 2))
    assert result.headline == "score"
    assert result.metrics["shots5/score"] == pytest.approx((0.805 + 0.905 + 0.405) / 3)
    assert result.metrics["score"] == result.metrics["shots20/score"] == pytest.approx(0.72)
    assert (
        result.metrics["voc/map_11_point"]
        == result.metrics["voc/shots20/map_11_point"]
        == pytest.approx(0.82)
    )
    assert result.metrics["memes/roc_auc"] == pytest.approx(0.42)
    single = elevater(["digits"], run, shots=(5,), seeds=(1,))
    assert single.metrics["digits/accuracy"] == single.metrics["score"] == pytest.approx(0.905)


def test_names_of_folders_make_names_of_files() -> None:
    first, second = (Cell(f"folder:/some/{x}/my images/", 1, 1).name for x in "ab")
    assert first != second
    assert first.startswith("folder-my-images-")
    assert "/" not in first
    assert ":" not in first
    assert Cell("scenes/shape", 4, 2, target="scenes/shape@sketch").name == (
        "scenes-shape_4shots_seed2_on_scenes-shape@sketch"
    )
