"""The benchmark of mask tuning compares like with like: ours and the port make the same update."""

from __future__ import annotations

import pytest
import torch

from benchmarks import BENCHMARKS
from vlprompt.backbones import Backbone


@pytest.mark.parametrize("learner", ["ramt", "rpmt"])
def test_ours_and_the_port_make_the_same_update(
    learner: str, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.masks.create_backbone", lambda name: backbone)
    before = {n: t.clone() for n, t in backbone.state_dict().items()}
    result = BENCHMARKS.get("masks").target(learner=learner, classes=5, batch=4, masked=0.1)
    assert (
        result["update_rel_diff"] < 0.02
    )  # a draw may fall on the other side of a probability that differs in a bit
    ratios = result["ratios"]
    ours, tuning = result["ours"]["cpu_seconds"], result["full_fine_tuning"]["cpu_seconds"]
    both = tuning + result["teacher_forward"]["cpu_seconds"]
    assert ratios["time_over_fine_tuning_and_teacher"] == pytest.approx(ours / both)
    assert ratios["speedup_over_port"] == pytest.approx(result["port"]["cpu_seconds"] / ours)
    assert all(torch.equal(backbone.state_dict()[n], t) for n, t in before.items())


def test_the_port_can_be_left_out(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.masks.create_backbone", lambda name: backbone)
    result = BENCHMARKS.get("masks").target(learner="amt", classes=3, batch=2, port=False)
    assert "port" not in result
    assert "speedup_over_port" not in result["ratios"]
    assert result["switch_tasks"]["seconds"] > 0
