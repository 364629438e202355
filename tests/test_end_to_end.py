"""What the embedded backbone and data are for: a learner trained on a few shots beats its own zero-shot."""

from __future__ import annotations

from typing import Any

import pytest

import vlprompt


def _gain(data: str, learner: str, options: dict[str, Any], training: dict[str, Any]) -> float:
    """Return the test accuracy after training on 16 shots, minus zero-shot's."""
    backbone = vlprompt.create_backbone("tiny")
    train, test = (vlprompt.load_dataset(data, split, shots=16, seed=1) for split in ("train", "test"))
    zero = vlprompt.create_learner("zero_shot", backbone, test.classnames, test.templates)
    learned = vlprompt.create_learner(learner, backbone, train.classnames, train.templates, **options)
    vlprompt.fit(learned, train, seed=1, callbacks=[], **training)
    return vlprompt.evaluate(learned, test)["accuracy"] - vlprompt.evaluate(zero, test)["accuracy"]


@pytest.mark.parametrize(
    ("learner", "options", "training", "margin"),
    [
        ("linear_probe", {}, {}, 0.05),
        ("clip_adapter", {}, {"epochs": 50, "lr": 0.003, "optimizer": "adamw", "weight_decay": 0}, 0.05),
        ("coop", {"context_length": 8}, {"epochs": 30, "lr": 0.1}, 0.01),
    ],
)
def test_real_handwriting_is_read_better(
    learner: str, options: dict[str, Any], training: dict[str, Any], margin: float
) -> None:
    assert _gain("digits", learner, options, training) >= margin


@pytest.mark.slow
def test_visual_prompts_adapt_to_a_style_that_pretraining_never_saw() -> None:
    training = {"epochs": 10, "lr": 0.5, "batch_size": 16}
    assert _gain("scenes/shape@sketch", "vpt", {"visual_length": 8}, training) >= 0.02
