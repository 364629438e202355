from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from vlprompt.classification.transfer_matrix import TransferMatrix
from vlprompt.core.errors import DataError

NAMES = ("a", "b", "c")
STUDY = TransferMatrix(
    NAMES,
    np.array([0.5, 0.4, 0.8]),
    np.array([[0.6, 0.5, 0.8], [0.55, 0.3, 0.4], [0.45, 0.5, 1.0]]),
)


def test_gains_by_hand() -> None:
    expected = [[20, 25, 0], [10, -25, -50], [-10, 25, 25]]
    np.testing.assert_allclose(STUDY.gains(), expected)


def test_ranking_leaves_a_task_out_as_its_own_source() -> None:
    """For a: b 1, c 2. For b: a and c share 1.5. For c: a 1, b 2."""
    assert STUDY.ranking() == [("a", 1.25), ("b", 1.5), ("c", 1.75)]
    assert STUDY.metrics()["mean_gain_accuracy"] == pytest.approx(np.mean([0.1, 0, 0.05, -0.4, -0.05, 0.1]))
    assert STUDY.metrics()["a->b/gain_accuracy"] == pytest.approx(0.1)


def test_groups_hold_tasks_that_help_each_other() -> None:
    """Gains in percent of 0.5; a, b help each other most, c helps b but hurts a more, d, e a little."""
    gains = np.array(
        [
            [0, 8, -9, -1, 1],
            [6, 0, 1, -5, -2],
            [-9, 5, 0, -4, -3],
            [-2, -1, 0, 0, 3],
            [-3, -1, -2, -1, 0],
        ]
    )
    names = ("a", "b", "c", "d", "e")
    matrix = TransferMatrix(names, np.full(5, 0.5), 0.5 * (1 + gains / 100))
    assert matrix.groups() == [("a", "b"), ("c",), ("d", "e")]  # (a, b) with c: (-9 - 9 + 1 + 5) / 4 < 0
    assert matrix.record()["helpful_groups"] == [["a", "b"], ["c"], ["d", "e"]]
    assert matrix.text().endswith("groups that help each other: a, b; c; d, e")
    gap = matrix.accuracy.copy()
    gap[0, 1] = np.nan
    alone = TransferMatrix(names, matrix.scratch, gap)
    assert ("a", "b") not in alone.groups()
    everything = TransferMatrix(names, matrix.scratch, np.full((5, 5), 0.6))
    assert everything.groups() == [names]


def test_a_missing_run_leaves_a_gap_and_drops_only_its_target() -> None:
    accuracy = STUDY.accuracy.copy()
    accuracy[0, 1] = np.nan
    study = TransferMatrix(NAMES, STUDY.scratch, accuracy)
    assert dict(study.ranking()) == {"a": 1.0, "b": 1.5, "c": 2.0}
    record = study.record()
    assert record["relative_gain_percent"][0][1] is None
    again = TransferMatrix.from_record(record)
    assert math.isnan(again.accuracy[0, 1])
    np.testing.assert_array_equal(again.gains(), study.gains())
    assert "nan" in study.text()
    assert "sources by mean rank: a 1.00" in study.text()


def test_files(tmp_path: Path) -> None:
    STUDY.write(tmp_path)
    lines = (tmp_path / "transfer.csv").read_text().splitlines()
    assert lines[0] == "source,a,b,c"
    assert lines[2] == "b,10.0,-25.0,-50.0"
    assert (tmp_path / "transfer.png").read_bytes().startswith(b"\x89PNG")
    assert STUDY.figure().startswith("<svg")
    assert "+25.0" in STUDY.figure()


def test_shapes_must_fit() -> None:
    with pytest.raises(DataError, match="3 tasks need 3 accuracies"):
        TransferMatrix(NAMES, np.zeros(2), np.zeros((3, 3)))
