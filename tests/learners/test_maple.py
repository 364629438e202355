"""MaPLe against the authors' code, and what is special to it: half a phrase is learned, the image side follows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.golden.text_learners import read_golden
from tests.golden.visual_learners import check_case, put, vit_b16
from vlprompt import create_learner
from vlprompt.backbones import Backbone
from vlprompt.backbones.layout import is_slot
from vlprompt.core.errors import DataError

GOLDEN = read_golden("maple_vit_b16")
NAMES = ["dog", "red circle", "hummingbird"]


def test_equals_the_authors_code() -> None:
    case = "depth9"
    learner = create_learner(
        "maple", vit_b16(), GOLDEN["classnames"], **GOLDEN["cases"][case]["options"]
    ).train()
    spread = {"deep_context": 0.02}
    for layer in range(9):
        spread |= {f"projections.{layer}.weight": 0.03, f"projections.{layer}.bias": 0.02}
    put(case, spread, learner)
    check_case(GOLDEN, case, learner)


def test_two_tokens_are_learned_and_the_rest_stays_as_written(backbone: Backbone) -> None:
    learner = create_learner("maple", backbone, NAMES, depth=1)
    written = backbone.text.sentence("a photo of a dog.")
    sentence = list(learner.layout.sentences[0])
    assert [is_slot(s) for s in sentence] == [False, True, True] + [False] * (len(written) - 3)
    assert sentence[3:] == written[3:]
    assert torch.equal(learner.context, backbone.text.embed_tokens(written[1:3]))
    # Untrained and shallow, its text side therefore says what the sentence says.
    torch.testing.assert_close(
        learner.class_weights(), backbone.encode_text([f"a photo of a {n}." for n in NAMES])
    )


def test_the_image_side_teaches_the_text_prompts(backbone: Backbone, images: Tensor) -> None:
    learner = create_learner("maple", backbone, NAMES)
    learner.embed_images(images).sum().backward()
    assert learner.context.grad.any()
    assert all(row.any() for row in learner.deep_context.grad)


def test_depth_is_what_both_towers_have(make_backbone: Callable[..., Backbone], images: Tensor) -> None:
    learner = create_learner("maple", make_backbone(text={"layers": 2}, vision={"layers": 4}), NAMES, depth=9)
    assert learner.visual_prompts().tokens.shape == (2, 2, 64)
    assert learner.deep_context.shape == (1, 2, 64)
    assert learner(images).shape == (6, 3)


def test_a_phrase_shorter_than_the_context_is_refused(backbone: Backbone) -> None:
    with pytest.raises(DataError, match=r"init='a photo' has 2 tokens, fewer than context_length=3.*init=''"):
        create_learner("maple", backbone, NAMES, context_length=3, init="a photo")
    assert create_learner("maple", backbone, NAMES, context_length=3, init="").context.shape == (3, 64)
