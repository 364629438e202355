"""The benchmark of kept prefixes compares like with like: both trainings end at the same parameters."""

from __future__ import annotations

from benchmarks import BENCHMARKS


def test_both_ways_learn_the_same() -> None:
    options = {"backbone": "tiny", "classes": 2, "shots": 2, "batch": 2, "epochs": 2, "repeats": 1}
    result = BENCHMARKS.get("prefix").target(**options)
    assert result["max_abs_diff"] == 0
    assert result["speedup"] == result["again_epoch_s"] / result["kept_epoch_s"]
