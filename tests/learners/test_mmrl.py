"""MMRL: the authors' numbers, the score by known and unknown names, what is frozen, no stale tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.golden.text_learners import close, read_golden, small_clip, small_embeddings
from tests.golden.weights import filled
from tests.learners.twenty_steps import golden_images, train_twenty_steps
from vlprompt import create_learner, load, save
from vlprompt.backbones import Backbone
from vlprompt.backbones.tokenizer import TextTokenizer
from vlprompt.core.errors import BackboneError
from vlprompt.learners import Learner

GOLDEN = read_golden("mmrl_small")
NAMES = ["dog", "red circle", "American staffordshire terrier"]
CONV = {"layers": (1, 1, 1, 1), "width": 16, "head_width": 16}
TEMPLATE = ["a photo of a {}, a type of pet."]


@pytest.fixture(scope="module")
def golden_backbone(tokenizer: TextTokenizer) -> Backbone:
    return small_clip(GOLDEN, tokenizer)


def golden_learner(backbone: Backbone) -> Learner:
    options = {"tokens": 4, "space": 24, "regularisation": 2.0}
    learner = create_learner("mmrl", backbone, GOLDEN["classnames"], TEMPLATE, **options)
    spread = {"tokens": 0.5, "head": 0.1}
    with torch.no_grad():
        for name, parameter in learner.learned_parameters().items():
            parameter.copy_(filled(f"mmrl/{name}", parameter.shape, spread.get(name, 0.2)))
    return learner.train()


def test_equals_the_authors_code(golden_backbone: Backbone) -> None:
    golden = GOLDEN["forward"]
    learner = golden_learner(golden_backbone)
    small_embeddings(GOLDEN, golden_backbone)  # checks the recipe's images
    images = golden_images(learner)
    own, of_tokens = learner._both(learner.embed_images(images), learner.class_weights())
    close(own, golden["logits"])
    close(of_tokens, golden["token_logits"])
    close(learner(images), golden["fused_logits"])
    losses = learner.loss({"image": images, "label": torch.tensor(GOLDEN["labels"])})
    assert set(losses) == {"cross_entropy", "token_cross_entropy", "image_distance", "text_distance"}
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    close(total, golden["loss"])
    assert learner.learned_parameters().keys() == golden["gradients"].keys()
    for name, parameter in learner.learned_parameters().items():
        assert parameter.grad is not None
        expected = golden["gradients"][name]
        assert float(parameter.grad.norm()) == pytest.approx(expected["norm"], rel=1e-4)
        torch.testing.assert_close(
            parameter.grad.flatten()[::61],
            torch.tensor(expected["every_61st"]),
            rtol=1e-4,
            atol=1e-4 * expected["norm"],
        )


def test_twenty_steps_equal_the_authors(golden_backbone: Backbone) -> None:
    golden = GOLDEN["run"]
    learner = golden_learner(golden_backbone)
    losses = train_twenty_steps(learner, GOLDEN["labels"], lr=1e-3, weight_decay=5e-4, optimizer="adamw")
    assert losses == pytest.approx(golden["losses"], rel=1e-3)
    images = golden_images(learner)
    with torch.no_grad():
        fused = learner(images)
        new = learner.with_classes([*GOLDEN["classnames"], "tulip"])(images)[:, :6]
    expected = torch.tensor(golden["fused_logits"])
    torch.testing.assert_close(fused, expected, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(new, torch.tensor(golden["logits"]), rtol=1e-3, atol=1e-2)
    stale = torch.tensor(golden["fused_logits_with_tokens_of_step_10"])
    assert (expected - stale).abs().max() > 0.1  # what their code says after an evaluation in between


def test_an_evaluation_in_between_leaves_no_stale_tokens(golden_backbone: Backbone) -> None:
    learner = golden_learner(golden_backbone)
    images = golden_images(learner)
    with torch.no_grad():
        before = learner.eval()(images)
        learner.train()
        learner.tokens.add_(0.1)
        after = learner.eval()(images)
        fresh = golden_learner(golden_backbone).eval()
        fresh.load_trainable_state(learner.trainable_state())
        assert torch.equal(fresh(images), after)
    assert not torch.allclose(before, after, atol=1e-2)


def test_known_classes_have_both_features_others_the_tower_s_own(
    backbone: Backbone, images: torch.Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    learner = create_learner("mmrl", backbone, NAMES, alpha=0.6).eval()
    tau = backbone.logit_scale
    caplog.set_level("INFO", "vlprompt")
    with torch.no_grad():
        f, r = learner.embed_images(images).split(backbone.dim, dim=-1)
        weights = learner.class_weights()
        own = tau * F.normalize(f, dim=-1) @ weights.T
        both = 0.6 * own + 0.4 * tau * F.normalize(r, dim=-1) @ weights.T
        torch.testing.assert_close(learner(images), both)
        # Some of the trained classes, in another order: all are known.
        fewer = learner.with_classes(["Red Circle", "dog"])
        torch.testing.assert_close(fewer(images), both[:, [1, 0]], rtol=0, atol=1e-4)
        # One that is not: none has the second feature, so that scores stay comparable.
        mixed = learner.with_classes(["dog", "tulip", "red circle"])
        assert "mmrl: the head names 0 of 3 classes" in caplog.text
        torch.testing.assert_close(mixed(images)[:, [0, 2]], own[:, :2], rtol=0, atol=1e-4)
        save(mixed, tmp_path)
        assert torch.equal(load(tmp_path, backbone)(images), mixed(images))
        back = mixed.with_classes(NAMES)
        assert torch.equal(back(images), learner(images))


def test_the_scale_is_the_backbone_s(make_backbone: Callable[..., Backbone], images: torch.Tensor) -> None:
    """The published code has 100 in its place."""
    backbone = make_backbone()
    assert backbone.logit_scale != pytest.approx(100)
    learner = create_learner("mmrl", backbone, NAMES, alpha=1.0).eval()
    cosine = learner(images) / backbone.logit_scale
    assert cosine.abs().max() <= 1 + 1e-5


def test_the_frozen_towers_are_the_same_ones_without_tokens(backbone: Backbone, images: torch.Tensor) -> None:
    """No second copy: distances are to the backbone's own features."""
    learner = create_learner("mmrl", backbone, NAMES, regularisation=3.0).train()
    batch = {"image": images, "label": torch.arange(6) % 3}
    losses = learner.loss(batch)
    frozen = backbone.encode_image(images)
    texts = backbone.class_weights(NAMES, ["a photo of a {}."])
    f = F.normalize(learner.embed_images(images)[:, : backbone.dim], dim=-1)
    expected = 3 * (1 - (f * frozen).sum(-1).mean())
    torch.testing.assert_close(losses["image_distance"], expected, rtol=1e-4, atol=1e-5)
    expected = 3 * (1 - (learner.class_weights() * texts).sum(-1).mean())
    torch.testing.assert_close(losses["text_distance"], expected, rtol=1e-4, atol=1e-5)
    given = learner.loss({**batch, "frozen": backbone.image_embeddings(images)})
    torch.testing.assert_close(given["image_distance"], losses["image_distance"])


def test_projections_of_a_tower_start_from_one_draw(backbone: Backbone) -> None:
    learner = create_learner("mmrl", backbone, NAMES)
    for projections in (learner.to_text, learner.to_vision):
        first, second = projections
        assert torch.equal(first.weight, second.weight)
        assert torch.equal(first.bias, second.bias)
    assert not torch.equal(learner.to_text[0].weight, learner.to_vision[0].weight)


def test_towers_tokens_can_t_enter_are_refused(make_backbone: Callable[..., Backbone]) -> None:
    with pytest.raises(BackboneError, match="image tower's blocks can't be edited"):
        create_learner("mmrl", make_backbone(vision=CONV), NAMES)
    siglip = make_backbone({"no_causal_mask": True, "pool_type": "last"}, custom=True)
    with pytest.raises(BackboneError, match="tokens can't enter between the blocks"):
        create_learner("mmrl", siglip, NAMES)
