"""The benchmark of GRAM compares like with like: both steps have the same loss and the same gradients."""

from __future__ import annotations

import pytest

from benchmarks import BENCHMARKS
from vlprompt.backbones import Backbone


@pytest.mark.parametrize("regulator", ["diagonal", "gated"])
def test_both_steps_are_the_same(regulator: str, backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.gram.create_backbone", lambda name: backbone)
    result = BENCHMARKS.get("gram").target(ways=3, shots=2, regulator=regulator, repeats=1)
    assert result["loss_diff"] < 1e-4
    assert result["grad_rel_diff"] < 1e-3
    assert result["speedup"] == pytest.approx(result["naive_cpu_s"] / result["ours_cpu_s"])
    assert "encode" not in vars(backbone.text)  # the switch to the obvious way is off again
