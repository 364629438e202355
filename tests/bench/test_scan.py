"""The benchmark of scanning: both sides see the same pictures, and its ratios are of its own figures."""

from __future__ import annotations

import pytest

from vlprompt.backbones import Backbone
from vlprompt.bench import BENCHMARKS


def test_both_run_the_same_tower(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlprompt.bench.scan.create_backbone", lambda name: backbone)
    seen: list[int] = []
    handle = backbone.vision.visual.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    try:
        result = BENCHMARKS.get("scan").target(backbone="small", pictures=10, batch=4, repeats=1)
    finally:
        handle.remove()
    assert seen == [4, 4, 2] * 4  # tower and scan, each once to warm up and once on the clock
    assert result["ratio"] == pytest.approx(result["tower_cpu_ms"] / result["scan_cpu_ms"])
    assert result["wall_ratio"] == pytest.approx(result["scan_per_s"] / result["tower_per_s"])
