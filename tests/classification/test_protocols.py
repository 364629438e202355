"""Protocols: which cells they plan, and how their figures are computed from the long table."""

from __future__ import annotations

import pytest

from tests.classification.studies import figures, study
from vlprompt.classification.protocols import protocol_of
from vlprompt.classification.protocols.base_to_new import split_base_new
from vlprompt.core.errors import DataError
from vlprompt.experiments.cell import Cell
from vlprompt.experiments.statistics import harmonic_mean, summarise


def rising(cell: Cell) -> dict[str, float]:
    return {"accuracy": 0.5 + 0.02 * cell["shots"] + 0.01 * cell["seed"], "nll": 1.0 / cell["shots"]}


def test_fewshot_on_one_data_set() -> None:
    numbers = figures(study({"shots": [1, 16], "seeds": [1, 2, 3]}, ["digits"]), rising)
    spread = summarise([0.01, 0.02, 0.03])
    assert numbers["shots1/accuracy"] == pytest.approx(0.54)
    assert numbers["shots16/accuracy"] == numbers["accuracy"] == pytest.approx(0.84)
    assert numbers["accuracy_std"] == pytest.approx(spread.std)
    assert numbers["shots1/accuracy_ci95"] == pytest.approx(spread.ci95)
    assert numbers["shots16/nll"] == pytest.approx(1 / 16)
    assert not any(key.startswith("digits/") for key in numbers)


def test_fewshot_over_data_sets_averages_each_seed() -> None:
    def opposite(cell: Cell) -> dict[str, float]:
        return {"accuracy": 0.5 + (0.1 if cell["data"] == "digits" else -0.1) * cell["seed"]}

    numbers = figures(study({"shots": [4], "seeds": [1, 2]}, ["digits", "scenes/kind"]), opposite)
    assert numbers["digits/shots4/accuracy"] == pytest.approx(0.65)
    assert numbers["scenes/kind/shots4/accuracy"] == pytest.approx(0.35)
    assert numbers["accuracy"] == pytest.approx(0.5)
    assert numbers["accuracy_std"] == pytest.approx(0.0)  # the data sets' swings cancel within a seed


def test_a_seed_that_a_data_set_lacks_is_left_out_of_the_average() -> None:
    def breaks(cell: Cell) -> dict[str, float] | None:
        if (cell["data"], cell["seed"]) == ("scenes/kind", 2):
            return None
        return {"accuracy": 0.9 if (cell["data"], cell["seed"]) == ("digits", 2) else 0.5}

    numbers = figures(study({"shots": [1], "seeds": [1, 2, 3]}, ["digits", "scenes/kind"]), breaks)
    assert numbers["digits/shots1/accuracy"] == pytest.approx((0.5 + 0.9 + 0.5) / 3)
    assert numbers["accuracy"] == pytest.approx(0.5)


def test_no_finished_cell_is_no_figure() -> None:
    assert figures(study({"shots": [1], "seeds": [1, 2]}, ["digits"]), lambda _: None) == {}


def test_base_to_new_takes_the_interval_from_single_seeds() -> None:
    planned = study({"name": "base-to-new", "shots": [16], "seeds": [1, 2]}, ["digits"])

    def measure(cell: Cell) -> dict[str, float]:
        base = 0.8 + 0.01 * cell["seed"]
        return {"base/accuracy": base, "new/accuracy": 0.4, "harmonic_mean": harmonic_mean(base, 0.4)}

    numbers = figures(planned, measure)
    assert numbers["base/accuracy"] == pytest.approx(0.815)
    assert numbers["harmonic_mean"] == pytest.approx(harmonic_mean(0.815, 0.4))
    by_seed = summarise([harmonic_mean(0.81, 0.4), harmonic_mean(0.82, 0.4)])
    assert numbers["harmonic_mean_ci95"] == pytest.approx(by_seed.ci95)


def test_base_to_new_average_is_the_harmonic_mean_of_averages() -> None:
    values = {"digits": (0.9, 0.1), "scenes/kind": (0.5, 0.5)}

    def measure(cell: Cell) -> dict[str, float]:
        base, new = values[cell["data"]]
        return {"base/accuracy": base, "new/accuracy": new, "harmonic_mean": harmonic_mean(base, new)}

    numbers = figures(study({"name": "base-to-new", "seeds": [1]}, list(values)), measure)
    assert numbers["digits/harmonic_mean"] == pytest.approx(0.18)
    assert numbers["scenes/kind/harmonic_mean"] == pytest.approx(0.5)
    assert numbers["harmonic_mean"] == pytest.approx(harmonic_mean(0.7, 0.3))


def test_split_base_new_gives_the_odd_class_to_base() -> None:
    assert split_base_new(4) == ((0, 1), (2, 3))
    assert split_base_new(3) == ((0, 1), (2,))
    with pytest.raises(DataError, match="at least 2 classes, got 1"):
        split_base_new(1)


def test_an_average_over_fewer_data_sets_is_another_number() -> None:
    def measure(cell: Cell) -> dict[str, float] | None:
        if cell["data"] == "digits":
            return None
        return {"base/accuracy": 0.8, "new/accuracy": 0.4, "harmonic_mean": harmonic_mean(0.8, 0.4)}

    numbers = figures(study({"name": "base-to-new", "seeds": [1]}, ["digits", "scenes/kind"]), measure)
    assert numbers["scenes/kind/harmonic_mean"] == pytest.approx(harmonic_mean(0.8, 0.4))
    assert "harmonic_mean" not in numbers


CROSS = {"name": "cross-dataset", "shots": [16], "seeds": [1, 2], "targets": ["scenes/size", "scenes/count"]}


def test_across_trains_once_and_averages_the_targets() -> None:
    planned = study(CROSS, ["digits"])
    cells = protocol_of("cross-dataset").planned(planned)
    assert [(cell.get("target"), cell["seed"]) for cell in cells] == [
        (None, 1), ("scenes/size", 1), ("scenes/count", 1), (None, 2), ("scenes/size", 2), ("scenes/count", 2)
    ]  # fmt: skip
    assert len({cell.name for cell in cells}) == 6
    assert [cell.needs for cell in cells[:3]] == [(), (cells[0].name,), (cells[0].name,)]

    def measure(cell: Cell) -> dict[str, float]:
        value = {"scenes/size": 0.4, "scenes/count": 0.6, None: 0.9}[cell.get("target")] + 0.01 * cell["seed"]
        return {"score": value, "accuracy": value - 0.1, "zero_shot_score": 0.3}

    numbers = figures(planned, measure)
    assert numbers["source/score"] == pytest.approx(0.915)
    assert numbers["scenes/size/score"] == pytest.approx(0.415)
    assert numbers["score"] == pytest.approx(0.515)  # of the targets, without the source
    assert numbers["score_ci95"] == pytest.approx(summarise([0.51, 0.52]).ci95)
    assert numbers["accuracy"] == pytest.approx(0.415)
    assert numbers["zero_shot_score"] == pytest.approx(0.3)


def test_across_several_sources_averages_over_them_and_scores_none_on_itself() -> None:
    size, count = CROSS["targets"]
    values = {
        ("digits", None): 0.9,
        (size, None): 0.7,
        ("digits", size): 0.4,
        ("digits", count): 0.6,
        (size, count): 0.2,
    }
    planned = study({**CROSS, "seeds": [1]}, ["digits", size])
    assert len(protocol_of("cross-dataset").planned(planned)) == len(values)
    numbers = figures(planned, lambda cell: {"score": values[cell["data"], cell.get("target")]})
    assert numbers["source/score"] == pytest.approx(0.8)
    assert numbers[f"{size}/score"] == pytest.approx(0.4)
    assert numbers[f"{count}/score"] == pytest.approx(0.4)
    assert numbers["score"] == pytest.approx(0.4)


def test_across_survives_a_target_and_leaves_its_average_out() -> None:
    def measure(cell: Cell) -> dict[str, float] | None:
        return None if cell.get("target") == "scenes/count" else {"score": 0.5}

    numbers = figures(study({**CROSS, "seeds": [1]}, ["digits"]), measure)
    assert numbers["scenes/size/score"] == numbers["source/score"] == 0.5
    assert "score" not in numbers


def test_elevater_is_the_mean_of_each_data_sets_own_measure() -> None:
    own = {"digits": "accuracy", "scenes/kind": "map_11_point", "scenes/size": "roc_auc"}

    def measure(cell: Cell) -> dict[str, float]:
        value = {"digits": 0.9, "scenes/kind": 0.8, "scenes/size": 0.4}[cell["data"]] + cell["shots"] / 1000
        return {"accuracy": 0.5, own[cell["data"]]: value, "score": value}

    planned = study({"name": "elevater", "shots": [5, 20], "seeds": [1, 2]}, list(own))
    assert protocol_of("elevater").headline == "score"
    numbers = figures(planned, measure)
    assert numbers["shots5/score"] == pytest.approx((0.805 + 0.905 + 0.405) / 3)
    assert numbers["score"] == numbers["shots20/score"] == pytest.approx(0.72)
    assert numbers["scenes/kind/map_11_point"] == pytest.approx(0.82)
    assert numbers["scenes/kind/shots20/map_11_point"] == numbers["scenes/kind/map_11_point"]
    assert numbers["scenes/size/roc_auc"] == pytest.approx(0.42)
    single = figures(study({"name": "elevater", "shots": [5], "seeds": [1]}, ["digits"]), measure)
    assert single["digits/accuracy"] == single["score"] == pytest.approx(0.905)
