"""IVLP against the code of MaPLe's authors, and its one idea: the two sides know nothing of each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.golden.text_learners import read_golden, small_clip
from tests.golden.visual_learners import check_case, put
from vlprompt import create_learner
from vlprompt.backbones import Backbone
from vlprompt.backbones.tokenizer import TextTokenizer

GOLDEN = read_golden("promptsrc_ivlp_small")
NAMES = ["dog", "red circle", "hummingbird"]


@pytest.fixture(scope="module")
def golden_backbone(tokenizer: TextTokenizer) -> Backbone:
    return small_clip(GOLDEN, tokenizer)


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_equals_the_authors_code(case: str, golden_backbone: Backbone) -> None:
    options = GOLDEN["cases"][case]["options"]
    learner = create_learner("ivlp", golden_backbone, GOLDEN["classnames"], **options).train()
    put(case, {"deep_context": 0.02, "visual": 0.02}, learner)
    check_case(GOLDEN, case, learner)


def test_the_sides_are_independent(backbone: Backbone, images: Tensor) -> None:
    learner = create_learner("ivlp", backbone, NAMES)
    learner.embed_images(images).sum().backward()
    assert learner.visual.grad.any()
    assert learner.context.grad is None
    assert learner.deep_context.grad is None


def test_depths_are_set_apart(backbone: Backbone) -> None:
    learner = create_learner("ivlp", backbone, NAMES, text_depth=1, visual_depth=2, visual_length=3)
    shapes = {n: tuple(t.shape) for n, t in learner.trainable_state().items()}
    assert shapes == {"context": (4, 64), "visual": (2, 3, 64)}
    torch.testing.assert_close(
        learner.class_weights(), backbone.encode_text([f"a photo of a {n}." for n in NAMES])
    )
