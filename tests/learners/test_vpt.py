"""VPT against both published codes, and what is special to it: constant class weights, partial depth, dropout."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.golden.text_learners import read_golden, small_clip
from tests.golden.visual_learners import check_case, put
from vlprompt import create_learner
from vlprompt.backbones import Backbone
from vlprompt.backbones.tokenizer import TextTokenizer

APPEND, AFTER_CLS = read_golden("vpt_append_small"), read_golden("vpt_after_cls_small")
NAMES = ["dog", "red circle", "hummingbird"]


@pytest.fixture(scope="module")
def golden_backbone(tokenizer: TextTokenizer) -> Backbone:
    return small_clip(APPEND, tokenizer)


@pytest.mark.parametrize("case", APPEND["cases"])
def test_appended_prompts_equal_maples_baseline(case: str, golden_backbone: Backbone) -> None:
    options = APPEND["cases"][case]["options"]
    learner = create_learner("vpt", golden_backbone, APPEND["classnames"], **options).train()
    put(case, {"visual": 0.02}, learner)
    check_case(APPEND, case, learner)


@pytest.mark.parametrize("case", AFTER_CLS["cases"])
def test_inserted_prompts_equal_mvlpts_visual_family(case: str, golden_backbone: Backbone) -> None:
    options = AFTER_CLS["cases"][case]["options"]
    learner = create_learner("vpt", golden_backbone, AFTER_CLS["classnames"], **options).train()
    put(case, {"visual": 0.04}, learner)
    check_case(AFTER_CLS, case, learner)


@pytest.mark.parametrize("insertion", ["after_cls", "append"])
def test_partial_depth_runs_every_block(insertion: str, backbone: Backbone, images: Tensor) -> None:
    """MVLPT's loop skips the blocks above the deepest prompt."""
    learner = create_learner("vpt", backbone, NAMES, visual_depth=2, insertion=insertion)
    ran: list[int] = []
    blocks = list(backbone.vision.blocks)
    handles = [b.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, b in enumerate(blocks)]
    learner.embed_images(images)
    for handle in handles:
        handle.remove()
    assert learner.visual.shape[0] == 2
    assert ran == [0, 1, 2]


def test_class_weights_are_the_zero_shot_ones_made_once(backbone: Backbone) -> None:
    templates = ["itap of a {}.", "art of the {}."]
    learner = create_learner("vpt", backbone, NAMES, templates).train()
    zero_shot = create_learner("zero_shot", backbone, NAMES, templates)
    assert torch.equal(learner.class_weights(), zero_shot.class_weights())
    assert not learner.class_weights().requires_grad
    assert learner.class_weights() is learner.class_weights()
    assert list(learner.trainable_state()) == ["visual"]


def test_dropout_differs_by_image_and_stays_out_of_evaluation(backbone: Backbone, images: Tensor) -> None:
    learner = create_learner("vpt", backbone, NAMES, dropout=0.5, visual_depth=1)
    same = images[:1].expand(4, -1, -1, -1)
    torch.manual_seed(0)
    dropped = learner.train().embed_images(same)
    torch.manual_seed(0)
    assert torch.equal(dropped, learner.embed_images(same))
    assert (dropped[0] - dropped[1]).abs().max() > 1e-4
    without = create_learner("vpt", backbone, NAMES, visual_depth=1)
    assert torch.equal(learner.eval().embed_images(same), without.eval().embed_images(same))


def test_only_image_towers_matter(make_backbone: Callable[..., Backbone], images: Tensor) -> None:
    """A text tower that can't be prompted is no obstacle."""
    sentencelike = make_backbone(text={"embed_cls": True}, custom=True)
    assert sentencelike.text.refusal is not None
    learner = create_learner("vpt", sentencelike, NAMES)
    assert learner(images).shape == (6, 3)
