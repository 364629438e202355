"""The benchmark of test-time tuning compares like with like: both ways end at the same probabilities."""

from __future__ import annotations

import pytest

from benchmarks import BENCHMARKS
from vlprompt.backbones import Backbone


@pytest.mark.parametrize(("steps", "chunk"), [(1, 100), (2, 100), (2, 4)])
def test_both_ways_agree(steps: int, chunk: int, backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.tta.create_backbone", lambda name: backbone)
    monkeypatch.setattr("benchmarks.tta._NAIVE_CHUNK", chunk)
    result = BENCHMARKS.get("tta").target(classes=7, views=20, steps=steps, images=2, repeats=1)
    assert result["max_abs_diff_probs"] < 1e-4
    assert result["adaptation_moved_probs"] > 1e-3
    assert result["speedup"] == pytest.approx(result["naive_s"] / result["ours_s"])
    assert result["naive_classes_per_pass"] == min(7, chunk)
    assert "naive_s" not in BENCHMARKS.get("tta").target(classes=7, views=4, repeats=1, naive=False)
