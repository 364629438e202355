"""VPT against both published codes, and what is special to it: constant class weights, partial depth, dropout."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

import vlprompt
from tests.golden.text_learners import read_golden, small_clip
from tests.golden.visual_learners import check_case, put
from vlprompt import create_learner
from vlprompt.backbones import Backbone, PixelPrompts
from vlprompt.backbones.pixels import default_frame, frame_size
from vlprompt.backbones.tokenizer import TextTokenizer
from vlprompt.core.errors import ConfigError, VLPromptError

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


def test_only_image_towers_matter(backbone: Backbone, images: Tensor) -> None:
    """A text tower that can't be prompted is no obstacle."""
    alone = copy.deepcopy(backbone)
    alone.text.refusal = "nothing is known of it."
    learner = create_learner("vpt", alone, NAMES)
    assert learner(images).shape == (6, 3)


# --- pixels (Bahng et al. 2022)


@pytest.fixture(scope="module")
def resnet() -> Backbone:
    families = pytest.importorskip("tests.families", reason="families are built with transformers")
    return families.family_backbone("CLIP ResNet")


def test_where_tokens_cannot_enter_pixels_are_learned(resnet: Backbone, images: Tensor) -> None:
    learner = create_learner("vpt", resnet, NAMES)
    zero_shot = create_learner("zero_shot", resnet, NAMES)
    # The paper's share of the image: 30 of 224 pixels, here 4 of 32; all of the frame and nothing else is learned.
    assert {n: tuple(t.shape) for n, t in learner.trainable_state().items()} == {
        "frame": (3, 32 * 32 - 24 * 24)
    }
    torch.testing.assert_close(
        learner(images), zero_shot(images), rtol=0, atol=1e-6
    )  # it starts as zero-shot

    optimizer = torch.optim.SGD(learner.parameters(), lr=5.0)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    losses = []
    for _ in range(4):
        loss = learner.train().loss({"image": images, "label": labels})["cross_entropy"]
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[3] < losses[2] < losses[0]


def test_the_papers_frame_has_the_papers_number_of_parameters() -> None:
    """Bahng et al., section 3: a frame of 30 pixels around 224 x 224 has 69,840 parameters."""
    assert default_frame((224, 224)) == 30
    assert 3 * frame_size((224, 224), 30) == 69_840


@pytest.mark.parametrize(("frame", "patch"), [(3, 0), (0, 5), (3, 9)])
def test_pixels_are_added_where_they_are_learned(
    backbone: Backbone, images: Tensor, frame: int, patch: int
) -> None:
    learner = create_learner("vpt", backbone, NAMES, where="pixels", frame=frame, patch=patch)
    changed = images.clone()
    with torch.no_grad():
        for parameter in learner.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    if frame:
        values = iter(learner.frame.T)  # pixel by pixel, row by row
        for row in range(32):
            for column in range(32):
                if min(row, column) < frame or max(row, column) >= 32 - frame:
                    changed[:, :, row, column] += next(values)
    if patch:
        changed[:, :, :patch, :patch] += learner.patch
    torch.testing.assert_close(
        learner.embed_images(images), backbone.image_embeddings(changed), rtol=0, atol=1e-5
    )


def test_a_prompt_of_pixels_is_saved_and_loaded(resnet: Backbone, images: Tensor, tmp_path: Path) -> None:
    learner = create_learner("vpt", resnet, NAMES, patch=4)
    with torch.no_grad():
        for parameter in (learner.frame, learner.patch):
            parameter.normal_()
    vlprompt.save(learner, tmp_path / "prompt.safetensors")
    again = vlprompt.load(tmp_path / "prompt.safetensors", backbone=resnet)
    assert torch.equal(again.eval()(images), learner.eval()(images))


def test_pixels_dropped_in_training_differ_by_image(resnet: Backbone, images: Tensor) -> None:
    learner = create_learner("vpt", resnet, NAMES, dropout=0.5)
    with torch.no_grad():
        learner.frame.normal_()
    same = images[:1].expand(3, -1, -1, -1)
    dropped = learner.train().embed_images(same)
    assert (dropped[0] - dropped[1]).abs().max() > 1e-4
    kept = learner.eval().embed_images(same)
    torch.testing.assert_close(kept[0], kept[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frame": 0}, "nothing to learn"),
        ({"frame": 16}, "at most 15"),
        ({"frame": 0, "patch": 33}, "larger than the image"),
    ],
)
def test_pixels_that_do_not_fit_are_refused(resnet: Backbone, options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_learner("vpt", resnet, NAMES, **options)


def test_pixels_of_another_size_are_refused(backbone: Backbone, images: Tensor) -> None:
    with pytest.raises(VLPromptError, match="31 x 31 pixels, images of 32 x 32"):
        backbone.encode_image(images, PixelPrompts(torch.zeros(3, 31, 31)))
    with pytest.raises(VLPromptError, match="for 2 images, the batch has 6"):
        backbone.encode_image(images, PixelPrompts(torch.zeros(2, 3, 32, 32)))
