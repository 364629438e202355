"""The long table, and the tables that are laid out from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from vlprompt.core.errors import DataError
from vlprompt.experiments.layout import Layout, complete_means, tabulate
from vlprompt.experiments.results import Line, Results
from vlprompt.experiments.statistics import Summary

VALUES = {("a", 1): 0.5, ("a", 2): 0.7, ("b", 1): 0.3, ("b", 2): 0.4}


def lines(method: str, shift: float = 0.0, values: dict[tuple[str, int], float] = VALUES) -> Results:
    return Results(
        Line({"method": method, "data": data, "seed": seed}, "accuracy", value + shift)
        for (data, seed), value in values.items()
    )


def test_selection_by_value_values_and_condition() -> None:
    results = lines("one") + lines("two", 0.1)
    assert len(results.select(method="one")) == 4
    assert len(results.select(data=["a", "c"], seed=lambda seed: seed > 1)) == 2
    assert len(results.select("nll")) == 0
    assert len(results.select(part=None)) == 8  # a line that lacks a coordinate has None there
    assert results.select(method="one", data="a").value_by("seed") == {1: 0.5, 2: 0.7}
    with pytest.raises(DataError, match="seed=1 has several values of 'accuracy'"):
        results.value_by("seed")


def test_means_leave_incomplete_repetitions_out() -> None:
    results = lines("one", values={key: value for key, value in VALUES.items() if key != ("b", 2)})
    assert complete_means(results, "seed", "data", ["a", "b"]) == {1: pytest.approx(0.4)}
    assert complete_means(lines("one"), "seed", "data", ["a", "b"]) == {
        1: pytest.approx(0.4),
        2: pytest.approx(0.55),
    }


def test_a_row_without_one_of_the_data_sets_has_no_average() -> None:
    lacking = lines("two", values={key: value for key, value in VALUES.items() if key[0] != "b"})
    (table, *_) = tabulate(lines("one") + lacking, Layout("accuracy"))
    complete, incomplete = table.rows
    assert "average" in complete.values
    assert set(incomplete.values) == {"a"}


def test_tables_have_means_intervals_averages_and_paired_gains() -> None:
    layout = Layout("accuracy", baselines={"two": ("one",)}, note="A note.")
    values, gains = tabulate(lines("one") + lines("two", 0.1), layout)
    row = values.rows[0].values
    half = stats.t.ppf(0.975, 1) * np.std([0.5, 0.7], ddof=1) / 2**0.5
    assert row["a"] == Summary(
        pytest.approx(0.6), pytest.approx(np.std([0.5, 0.7], ddof=1)), pytest.approx(half), 2
    )
    assert row["average"].mean == pytest.approx((0.4 + 0.55) / 2)  # type: ignore[union-attr]
    assert values.columns == ["a", "b", "average"]
    assert gains.rows[0].method == "two"
    assert gains.rows[0].values["a"].ci95 == pytest.approx(0, abs=1e-12)  # type: ignore[union-attr]
    over_data = gains.rows[0].values["average over data sets"]
    assert over_data.mean == pytest.approx(0.1)  # type: ignore[union-attr]
    assert values.markdown().rstrip().endswith("A note.")


def test_a_baseline_that_was_measured_once_stands_beside_every_seed() -> None:
    once = Results([Line({"method": "zero", "data": "a", "seed": 1}, "accuracy", 0.4)])
    ours = lines("one").select(data="a")
    tables = tabulate(ours + once, Layout("accuracy", baselines={"one": ("zero",)}))
    gain = tables[1].rows[0].values["a"]
    assert gain.mean == pytest.approx(0.2)  # type: ignore[union-attr]
    assert gain.n == 2  # type: ignore[union-attr]


def test_each_value_of_a_table_coordinate_is_a_table() -> None:
    results = Results(
        Line({**line.where, "part": line.where["data"]}, "accuracy", line.value)
        for line in lines("one").lines
    )
    tables = tabulate(results, Layout("accuracy", tables=("part",)))
    assert [table.title for table in tables] == ["a", "b"]


@pytest.mark.parametrize(
    "text", ["{", '{"metric": "a"}', '{"metric": "a", "value": "x"}', "[1, 2]", '"a"', '{"value": 1}']
)
def test_a_damaged_table_names_the_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(f'{{"metric": "a", "value": 1}}\n{text}\n')
    with pytest.raises(DataError, match="line 2 is no line of results"):
        Results.read(path)


def test_the_table_survives_being_written(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(lines("über").text(), encoding="utf-8")
    assert Results.read(path).lines == lines("über").lines
