"""Text towers other than CLIP's own: what can be prompted is, exactly; the rest says why not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from open_clip.model import CustomTextCLIP
from torch import Tensor, nn

from vlprompt.backbones import Backbone
from vlprompt.backbones.openclip import wrap_open_clip
from vlprompt.core.errors import BackboneError
from vlprompt.learners import create_learner

NAMES = ("dog", "red circle", "hummingbird in flight")
TEXTS = ["", "a photo of a dog.", "hummingbird", "wow! what a dog!", "x " * 100]
SIGLIP = {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}
TOWERS: dict[str, dict[str, Any]] = {
    "custom_clip": {},
    "siglip": SIGLIP,
    "mobileclip": {"no_causal_mask": True},
    "clipa": {"pool_type": "last", "no_causal_mask": True, "context_length": 32},
    "causal_last": {"pool_type": "last"},
    "first": {"pool_type": "first", "no_causal_mask": True},
    "end_by_id": {"pool_type": "eos", "eos_id": 49407},
    "own_attention": {"block_type": "custom", "qk_norm": True, "scale_fc": True},
    "layer_scale": {"ls_init_value": 0.3},
    "no_projection": {"proj_type": "none", "width": 48},
    "padding_masked": {"no_causal_mask": True},
    "coca": {"embed_cls": True, "context_length": 76},
    "coca_mask_in_place": {"embed_cls": True, "context_length": 76},
    "coca_own_attention": {"embed_cls": True, "block_type": "custom", "qk_norm": True},
}
# What no configuration of open_clip sets, but its towers have.
SWITCHES = {"padding_masked": "use_pad_mask", "coca_mask_in_place": "correct_cls_mask"}
FAST = {"custom_clip", "end_by_id", "layer_scale", "no_projection"}


def build(make_backbone: Callable[..., Backbone], name: str) -> Backbone:
    siglip = {"init_logit_scale": 2.3, "init_logit_bias": -10.0} if name == "siglip" else {}
    backbone = make_backbone(TOWERS[name], custom=True, **siglip)
    if name not in SWITCHES:
        return backbone
    setattr(backbone.model.text, SWITCHES[name], True)
    facts = {"architecture": name, "pretrained": None}
    return wrap_open_clip(backbone.model, {"size": 32}, backbone.text.tokenizer, facts)


@pytest.mark.parametrize("name", TOWERS)
def test_strings_equal_open_clip(make_backbone: Callable[..., Backbone], name: str) -> None:
    backbone = build(make_backbone, name)
    tower = backbone.text
    rows = tower.tokenizer.rows(TEXTS, tower.context_length)
    with torch.no_grad():
        expected = backbone.model.encode_text(rows)
    torch.testing.assert_close(tower.encode_strings(TEXTS), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", TOWERS)
def test_a_learned_context_equals_the_words_it_copies(
    make_backbone: Callable[..., Backbone], name: str
) -> None:
    backbone = build(make_backbone, name)
    for position, text in (("end", "a photo of {}."), ("middle", "a {} photo of.")):
        learner = create_learner("coop", backbone, NAMES, init="a photo of", position=position)
        if position == "middle":
            expected = backbone.encode_text([text.format(n).replace(" of.", " of .") for n in NAMES])
        else:
            expected = backbone.encode_text([text.format(n) for n in NAMES])
        torch.testing.assert_close(learner.class_weights().detach(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", TOWERS)
def test_only_causal_towers_that_pool_at_the_end_share_and_pack(
    make_backbone: Callable[..., Backbone], name: str
) -> None:
    tower = build(make_backbone, name).text
    assert tower.packable == (name in FAST)
    layout = tower.layout([tower.sentence("a photo of a dog"), tower.sentence("a photo of a cat")])
    assert (layout.shared > 0) == ("no_causal_mask" not in TOWERS[name])


@pytest.mark.parametrize("name", TOWERS)
def test_every_tower_learns_by_context(
    make_backbone: Callable[..., Backbone], images: Tensor, name: str
) -> None:
    learner = create_learner("coop", build(make_backbone, name), NAMES, context_length=4).train()
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    optimizer = torch.optim.SGD([learner.context], lr=0.05)
    losses = []
    for _ in range(3):
        loss = learner.loss({"image": images, "label": labels})["cross_entropy"]
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]


def test_siglips_bias_is_kept_apart(make_backbone: Callable[..., Backbone], backbone: Backbone) -> None:
    siglip = build(make_backbone, "siglip")
    assert siglip.logit_bias == -10.0
    assert siglip.logit_scale == pytest.approx(2.718281828**2.3, rel=1e-5)
    assert backbone.logit_bias == 0.0


class ForeignTower(nn.Module):
    """A text tower from another library: ids in, features out, nothing else known."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(49408, 48)

    def forward(self, text: Tensor) -> Tensor:
        return self.words(text)


def foreign(make_backbone: Callable[..., Backbone]) -> Backbone:
    backbone = make_backbone(custom=True)
    model: CustomTextCLIP = backbone.model
    model.text = ForeignTower()
    return wrap_open_clip(
        model, {"size": 32}, backbone.text.tokenizer, {"architecture": "foreign", "pretrained": None}
    )


def test_a_tower_that_takes_no_context_says_why_and_still_classifies(
    make_backbone: Callable[..., Backbone], images: Tensor
) -> None:
    backbone = foreign(make_backbone)
    reason = r"\(ForeignTower\) shows neither token embeddings nor blocks. What works here: .*vpt"
    with pytest.raises(BackboneError, match=reason):
        create_learner("coop", backbone, NAMES)
    rows = backbone.text.tokenizer.rows(TEXTS, backbone.text.context_length)
    with torch.no_grad():
        expected = backbone.model.encode_text(rows)
    torch.testing.assert_close(backbone.text.encode_strings(TEXTS), expected, rtol=0, atol=1e-5)
    assert create_learner("zero_shot", backbone, NAMES).eval()(images).shape == (6, 3)
    assert create_learner("linear_probe", backbone, NAMES).eval()(images).shape == (6, 3)


def test_without_a_tokenizer_images_still_work(backbone: Backbone, images: Tensor) -> None:
    bare = wrap_open_clip(
        backbone.model,
        {"size": 32},
        None,
        {"architecture": "small", "pretrained": None},
        "no tokenizer: install it",
    )
    assert torch.equal(bare.encode_image(images), backbone.encode_image(images))
    for learner in ("coop", "zero_shot"):
        with pytest.raises(BackboneError, match="no tokenizer: install it"):
            create_learner(learner, bare, NAMES)
