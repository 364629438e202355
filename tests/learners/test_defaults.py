"""Learners with default options, trained as their recipe says, beat zero-shot on the embedded digits."""

from __future__ import annotations

import pytest

from vlprompt import create_learner, evaluate, fit, load_dataset
from vlprompt.backbones import create_backbone


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tcp", "lasp", "coprompt"])
def test_beats_zero_shot_on_digits_at_16_shots(name: str) -> None:
    backbone = create_backbone("tiny")
    train, test = (load_dataset("digits", split, shots=16, seed=1) for split in ("train", "test"))
    learner = create_learner(name, backbone, train.classnames, train.templates)
    fit(learner, train, callbacks=[])
    zero_shot = create_learner("zero_shot", backbone, train.classnames, train.templates)
    assert evaluate(learner, test)["accuracy"] > evaluate(zero_shot, test)["accuracy"] + 0.05
