"""Learners that change both towers beat zero-shot on real digits, 16 shots: few steps at rates of tiny."""

from __future__ import annotations

from typing import Any

import pytest

from vlprompt import create_backbone, create_learner, evaluate, fit, load_dataset

pytestmark = pytest.mark.slow
FOUND: dict[str, dict[str, Any]] = {
    "two_stage": {"lr": 0.02, "optimizer": "adamw", "weight_decay": 0.01},
    "mma": {"lr": 60.0, "weight_decay": 5e-7},
    "mmrl": {"lr": 0.01, "optimizer": "adamw"},
}


@pytest.mark.parametrize("name", FOUND)
def test_it_beats_zero_shot(name: str) -> None:
    backbone = create_backbone("tiny")
    train = load_dataset("digits", "train", shots=16, seed=1)
    test = load_dataset("digits", "test")
    zero_shot = create_learner("zero_shot", backbone, test.classnames, test.templates)
    learner = create_learner(name, backbone, train.classnames, train.templates)
    schedule = {"steps": 40, "batch_size": 16, "schedule": "cosine", "warmup_epochs": 0, "grad_clip": 1.0}
    fit(learner, train, callbacks=[], **schedule, **FOUND[name])
    assert evaluate(learner, test)["accuracy"] > evaluate(zero_shot, test)["accuracy"] + 0.03
