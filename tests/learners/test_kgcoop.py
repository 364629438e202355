"""KgCoOp against the authors' code, its equation written out, and its two limits: CoOp and zero-shot."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.golden.text_learners import close, read_golden, small_clip, small_embeddings
from tests.golden.weights import filled
from vlprompt import create_learner, fit, load_dataset
from vlprompt.backbones import Backbone
from vlprompt.backbones.tokenizer import TextTokenizer
from vlprompt.learners import Learner

GOLDEN = read_golden("kgcoop_small")
NAMES = ["dog", "red circle", "American staffordshire terrier", "hummingbird"]


@pytest.fixture(scope="module")
def golden_backbone(tokenizer: TextTokenizer) -> Backbone:
    return small_clip(GOLDEN, tokenizer)


@pytest.fixture(scope="module")
def batch(backbone: Backbone, images: Tensor) -> dict[str, Tensor]:
    return {"embedding": backbone.image_embeddings(images), "label": torch.arange(6) % 4}


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_equals_the_authors_code(case: str, golden_backbone: Backbone) -> None:
    golden = GOLDEN["cases"][case]
    names, options = GOLDEN["classnames"], golden["options"]
    learner = create_learner("kgcoop", golden_backbone, names, [golden["template"]], **options).train()
    if not options["init"]:
        with torch.no_grad():
            learner.context.copy_(filled(f"context/{case}", learner.context.shape, 0.02))
    embeddings = small_embeddings(GOLDEN, golden_backbone)
    losses = learner.loss({"embedding": embeddings, "label": torch.tensor(GOLDEN["labels"])})
    sum(losses.values()).backward()
    close(learner.logits(embeddings), golden["logits"])
    close(losses["cross_entropy"], golden["cross_entropy"])
    close(losses["knowledge"], golden["knowledge"])
    close(learner.context.grad.norm(dim=-1), golden["gradient_norms"])
    close(learner.context.grad.flatten()[::61], golden["gradient_every_61st"])


def test_the_regulariser_is_zero_where_the_context_says_what_the_template_says(
    backbone: Backbone, batch: dict[str, Tensor]
) -> None:
    at_template = create_learner("kgcoop", backbone, NAMES, ["a photo of a {}."], weight=1.0)
    elsewhere = create_learner("kgcoop", backbone, NAMES, ["the origami {}."], weight=1.0)
    assert abs(at_template.loss(batch)["knowledge"].item()) < 1e-6
    assert elsewhere.loss(batch)["knowledge"].item() > 1e-3


def test_the_regulariser_is_half_the_mean_squared_distance_to_the_averaged_templates(
    backbone: Backbone, batch: dict[str, Tensor]
) -> None:
    templates = ["itap of a {}.", "art of the {}."]
    learner = create_learner("kgcoop", backbone, NAMES, templates, weight=3.0, init="")
    distances = []
    for name, weight in zip(NAMES, learner.class_weights(), strict=True):
        features = backbone.encode_text([t.format(name) for t in templates])
        teacher = F.normalize(features[0] + features[1], dim=0)
        distances.append((weight - teacher).square().sum())
    expected = 3.0 * torch.stack(distances).mean() / 2
    torch.testing.assert_close(learner.loss(batch)["knowledge"], expected)


def test_without_weight_it_is_coop(backbone: Backbone, batch: dict[str, Tensor]) -> None:
    coop = create_learner("coop", backbone, NAMES, init="a photo of a").train()
    learner = create_learner("kgcoop", backbone, NAMES, ["the origami {}."], weight=0.0).train()
    gradients = [torch.autograd.grad(sum(x.loss(batch).values()), x.context)[0] for x in (coop, learner)]
    torch.testing.assert_close(*gradients)


def test_the_regulariser_stays_in_half_precision(backbone: Backbone, batch: dict[str, Tensor]) -> None:
    """The authors' mixed-precision branch drops it."""
    half = copy.deepcopy(backbone).set_precision("bf16")
    full = create_learner("kgcoop", backbone, NAMES, init="").train().loss(batch)["knowledge"]
    learner = create_learner("kgcoop", half, NAMES, init="").train()
    mixed = learner.loss(batch)["knowledge"]
    mixed.backward()
    assert full.item() > 1e-2
    assert mixed.item() == pytest.approx(full.item(), rel=0.05)
    assert learner.context.grad.any()


def test_only_the_context_is_learned_and_the_teacher_follows_the_classes(backbone: Backbone) -> None:
    learner = create_learner("kgcoop", backbone, NAMES)
    assert list(learner.trainable_state()) == ["context"]
    other = learner.with_classes(["ring", "cross"])
    zero_shot = create_learner("zero_shot", backbone, ["ring", "cross"])
    torch.testing.assert_close(other.zero_shot, zero_shot.class_weights())


def test_a_heavier_weight_stays_nearer_while_learning_digits(backbone: Backbone) -> None:
    train = load_dataset("digits", "train", shots=4, seed=1)

    def trained(weight: float) -> tuple[Learner, list[dict[str, float]]]:
        learner = create_learner("kgcoop", backbone, train.classnames, train.templates, weight=weight)
        result = fit(learner, train, epochs=6, batch_size=20, lr=0.01, callbacks=[])
        return learner, result.history

    free, history = trained(0.0)
    held, _ = trained(80.0)
    assert history[-1]["cross_entropy"] < history[0]["cross_entropy"]
    with torch.no_grad():
        distance = [float(1 - (x.class_weights() * x.zero_shot).sum(-1).mean()) for x in (free, held)]
    assert distance[1] < 0.7 * distance[0]
