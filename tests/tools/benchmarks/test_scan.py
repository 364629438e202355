"""The benchmark of scanning: both sides see the same images, and its ratios are of its own figures."""

from __future__ import annotations

import pytest

from benchmarks import BENCHMARKS
from benchmarks.measure import Measured
from benchmarks.scan import _figures
from vlprompt.backbones import Backbone


def test_both_run_the_same_tower(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.scan.create_backbone", lambda name: backbone)
    seen: list[int] = []
    handle = backbone.vision.visual.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    try:
        result = BENCHMARKS.get("scan").target(backbone="small", images=10, batch=4, repeats=2)
    finally:
        handle.remove()
    assert seen == [4, 4, 2] * 6  # tower and scan, each once to warm up and twice on the clock
    assert len(result["ratios"]) == 2
    assert result["ratio"] == pytest.approx(sum(result["ratios"]) / 2, abs=1e-3)


def test_the_ratio_is_that_of_the_middle_pair() -> None:
    tower = [Measured(wall, cpu, None, None) for wall, cpu in ((1.0, 2.0), (2.0, 9.0), (3.0, 3.0))]
    scanning = [Measured(wall, cpu, None, None) for wall, cpu in ((2.0, 4.0), (2.0, 3.0), (4.0, 5.0))]
    found = _figures(10, tower, scanning)
    assert found["ratios"] == [0.5, 3.0, 0.6]
    assert (found["ratio"], found["wall_ratio"]) == (0.6, 0.75)
    assert (found["tower_per_s"], found["scan_per_s"]) == (5.0, 5.0)
    assert (found["tower_cpu_ms"], found["scan_cpu_ms"]) == (300.0, 400.0)
