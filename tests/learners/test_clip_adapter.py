"""CLIP-Adapter against the authors' code, and at the two ends of its mixing ratio."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.golden.text_learners import close, read_golden, small_clip, small_embeddings
from tests.golden.weights import filled
from vlprompt import create_learner
from vlprompt.backbones import Backbone
from vlprompt.backbones.tokenizer import TextTokenizer
from vlprompt.core.errors import ConfigError

GOLDEN = read_golden("clip_adapter_small")
NAMES = ["dog", "red circle", "hummingbird"]


@pytest.fixture(scope="module")
def golden_backbone(tokenizer: TextTokenizer) -> Backbone:
    return small_clip(GOLDEN, tokenizer)


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_equals_the_authors_code(case: str, golden_backbone: Backbone) -> None:
    golden = GOLDEN["cases"][case]
    learner = create_learner(
        "clip_adapter", golden_backbone, GOLDEN["classnames"], [golden["template"]]
    ).train()
    weights = [learner.adapter[0].weight, learner.adapter[2].weight]
    with torch.no_grad():
        for number, weight in zip((0, 2), weights, strict=True):
            weight.copy_(filled(f"{case}/adapter.{number}.weight", weight.shape, 0.3))
    logits = learner.logits(small_embeddings(GOLDEN, golden_backbone))
    loss = F.cross_entropy(logits, torch.tensor(GOLDEN["labels"]))
    loss.backward()
    close(logits, golden["logits"])
    close(loss, golden["loss"])
    for weight, norm, values in zip(
        weights, golden["gradient_norms"], golden["gradient_every_61st"], strict=True
    ):
        close(weight.grad.norm(), norm)
        close(weight.grad.flatten()[::61], values)


def test_a_ratio_of_zero_is_zero_shot_and_one_is_the_network_alone(
    backbone: Backbone, images: Tensor
) -> None:
    zero_shot = create_learner("zero_shot", backbone, NAMES).eval()
    none = create_learner("clip_adapter", backbone, NAMES, ratio=0.0).eval()
    alone = create_learner("clip_adapter", backbone, NAMES, ratio=1.0).eval()
    torch.testing.assert_close(none(images), zero_shot(images))
    features = F.normalize(alone.adapter(backbone.image_embeddings(images)), dim=-1)
    torch.testing.assert_close(alone(images), backbone.logit_scale * features @ zero_shot.class_weights().T)


def test_size_follows_the_backbone_and_names_may_change(backbone: Backbone, images: Tensor) -> None:
    learner = create_learner("clip_adapter", backbone, NAMES, reduction=4, seed=3)
    d = backbone.dim
    assert sum(t.numel() for t in learner.trainable_state().values()) == 2 * d * (d // 4)
    again = create_learner("clip_adapter", backbone, ["ring", "cross"], seed=3).eval()
    torch.testing.assert_close(learner.with_classes(["ring", "cross"]).eval()(images), again(images))


def test_impossible_ratio_is_refused(backbone: Backbone) -> None:
    with pytest.raises(ConfigError, match="ratio"):
        create_learner("clip_adapter", backbone, NAMES, ratio=1.5)
