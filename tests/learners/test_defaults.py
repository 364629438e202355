"""Learners beat zero-shot on the embedded digits at 16 shots: as their recipe says, or in few steps at a given rate."""

from __future__ import annotations

from typing import Any

import pytest

from vlprompt import create_learner, evaluate, fit, load_dataset
from vlprompt.backbones import create_backbone

# The search of a rate takes minutes for these, which learn in both towers, so a rate is given.
RATES: dict[str, dict[str, Any]] = {
    "two_stage": {"lr": 0.02, "optimizer": "adamw", "weight_decay": 0.01},
    "mma": {"lr": 60.0, "weight_decay": 5e-7},
    "mmrl": {"lr": 0.01, "optimizer": "adamw"},
}
SCHEDULE = {"steps": 40, "batch_size": 16, "schedule": "cosine", "warmup_epochs": 0, "grad_clip": 1.0}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tcp", "lasp", "coprompt", *RATES])
def test_beats_zero_shot_on_digits_at_16_shots(name: str) -> None:
    backbone = create_backbone("tiny")
    train, test = (load_dataset("digits", split, shots=16, seed=1) for split in ("train", "test"))
    learner = create_learner(name, backbone, train.classnames, train.templates)
    options = {**SCHEDULE, **RATES[name]} if name in RATES else {}
    fit(learner, train, callbacks=[], **options)
    zero_shot = create_learner("zero_shot", backbone, train.classnames, train.templates)
    assert evaluate(learner, test)["accuracy"] > evaluate(zero_shot, test)["accuracy"] + 0.03
