"""Zero-shot classification is the mean over templates, whatever was built before."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vlprompt.backbones import Backbone
from vlprompt.learners import create_learner

NAMES = ("dog", "red_circle", "hummingbird")
TEMPLATES = ("a photo of a {}.", "itap of a {}.", "art of the {}.")


def test_equals_a_slow_loop_over_open_clip(backbone: Backbone, images: Tensor) -> None:
    weights = []
    with torch.no_grad():
        for name in ("dog", "red circle", "hummingbird"):
            rows = backbone.text.tokenizer.rows([t.format(name) for t in TEMPLATES], 77)
            features = [F.normalize(backbone.model.encode_text(row[None])[0], dim=0) for row in rows]
            weights.append(F.normalize(sum(features) / len(features), dim=0))
        embedded = F.normalize(backbone.model.encode_image(images), dim=-1)
        expected = backbone.model.logit_scale.exp() * embedded @ torch.stack(weights).T
        got = create_learner("zero_shot", backbone, NAMES, TEMPLATES).eval()(images)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_building_twice_gives_the_same_weights(backbone: Backbone) -> None:
    templates = list(TEMPLATES)
    first = create_learner("zero_shot", backbone, NAMES, templates)
    second = create_learner("zero_shot", backbone, NAMES, templates)
    assert templates == list(TEMPLATES)
    assert torch.equal(first.class_weights(), second.class_weights())
    assert torch.equal(first.with_classes(NAMES).class_weights(), first.class_weights())
    assert first.templates == TEMPLATES


def test_the_order_of_templates_does_not_matter(backbone: Backbone) -> None:
    forward = create_learner("zero_shot", backbone, NAMES, TEMPLATES).class_weights()
    backward = create_learner("zero_shot", backbone, NAMES, TEMPLATES[::-1]).class_weights()
    torch.testing.assert_close(forward, backward, rtol=0, atol=1e-6)
    torch.testing.assert_close(forward.norm(dim=-1), torch.ones(3))


def test_nothing_is_learned(backbone: Backbone) -> None:
    learner = create_learner("zero_shot", backbone, NAMES, TEMPLATES)
    assert learner.trainable_state() == {}
    assert not any(p.requires_grad for p in learner.parameters())
    other = learner.with_classes(NAMES[:2], TEMPLATES[:1])
    assert torch.equal(other.class_weights(), backbone.class_weights(["dog", "red circle"], TEMPLATES[:1]))
