"""The comparison of ways to prompt at equal length measures what it says it measures."""

from __future__ import annotations

import pytest

from benchmarks import BENCHMARKS


@pytest.mark.slow
def test_all_take_steps_of_equal_length() -> None:
    result = BENCHMARKS.get("prompts").target(backbone="tiny", length=3, batch=2, classes=5, repeats=1)
    rows = result["learners"]
    assert set(rows) == {"vpt", "kv_prompts", "apt", "coop", "coop (4 vectors)", "dept", "dept (by token)"}
    assert rows["vpt"]["parameters"] == rows["kv_prompts"]["parameters"] == 5 * 3 * 160
    assert rows["apt"]["parameters"] == 5 * (3 * 160 + 2 * 4 * 160 + 1)
    for row in rows.values():
        assert row["step_cpu_s"] > 0
        assert row["ratio"] > 0
    assert rows["vpt"]["ratio"] == rows["coop"]["ratio"] == 1
