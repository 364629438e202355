"""The benchmark of segmentation compares like with like: ours and transformers' modules make the same gradient."""

from __future__ import annotations

import pytest

from benchmarks import BENCHMARKS

pytest.importorskip("transformers", reason="transformers is an optional extra")


def test_both_ways_make_the_same_gradient() -> None:
    result = BENCHMARKS.get("segment").target(
        size="small", batch=3, depths="1,2", text="cocoop", text_depth=2
    )
    assert set(result["cases"]) == {"vpt_1", "vpt_2", "cocoop_2"}
    for row in result["cases"].values():
        assert row["gradient_rel_diff"] < 1e-2
        assert row["speedup"] == pytest.approx(row["naive"]["cpu_seconds"] / row["ours"]["cpu_seconds"])
    speedups = [result["cases"][n]["speedup"] for n in ("vpt_1", "vpt_2")]
    assert result["ratios"]["vpt_mean_speedup"] == pytest.approx(sum(speedups) / 2)


def test_parts_can_be_left_out() -> None:
    result = BENCHMARKS.get("segment").target(size="small", batch=1, depths="", text="coop", text_depth=1)
    assert set(result["cases"]) == {"coop_1"}
    assert set(result["ratios"]) == {"text_mean_speedup", "text_mean_speedup_frozen_weights"}
