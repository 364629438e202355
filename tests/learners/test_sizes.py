"""How much is learned on ViT-B/16 is what the papers say, and so is where it enters."""

from __future__ import annotations

import pytest

from vlprompt import create_learner
from vlprompt.backbones import Backbone, create_backbone

NAMES = ["dog", "red circle", "hummingbird"]


@pytest.fixture(scope="module")
def papers_backbone() -> Backbone:
    return create_backbone("ViT-B-16")


@pytest.mark.parametrize(
    ("name", "numbers", "stages"),
    [
        ("two_stage", 61_440 + 3 * 512, 1),
        ("mma", 674_560, 5),
        ("mmrl", 4_992_256, 6),
        ("apt", 12 * (16 * 768 + 2 * 4 * 768 + 1), 1),
        ("kv_prompts", 147_456, 1),
    ],
)
def test_parameters_of_vit_b16(name: str, numbers: int, stages: int, papers_backbone: Backbone) -> None:
    learner = create_learner(name, papers_backbone, NAMES)
    assert sum(p.numel() for p in learner.learned_parameters().values()) == numbers
    assert learner.frozen_stages() == stages
