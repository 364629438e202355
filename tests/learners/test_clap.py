"""ZS-LP, CLAP and TaskRes: the authors' numbers over twenty steps, and how the three relate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.golden.text_learners import close, read_golden
from tests.golden.weights import filled
from vlprompt import create_learner, fit, load_dataset
from vlprompt.backbones import Backbone
from vlprompt.core.errors import DataError
from vlprompt.learners import Learner
from vlprompt.training.batches import TensorBatches
from vlprompt.training.options import TrainOptions
from vlprompt.training.trainer import Trainer

GOLDEN = read_golden("clap_small")
NAMES = ["dog", "red circle", "hummingbird", "tree"]
LABELS = torch.tensor(GOLDEN["labels"])
SGD = {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.0}
ADAM = {"optimizer": "adam", "lr": 2e-3, "weight_decay": 5e-4}
NAMED = ("zs_lp", "clap", "taskres")


@dataclass(frozen=True)
class Seen:
    """Training samples as a learner's survey sees them."""

    views: Tensor
    labels: Tensor
    positions: Tensor

    def training_data(self) -> tuple[Tensor, Tensor]:
        return self.views, self.labels


def recipe() -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return text (C, d), image embeddings (n, d) and two views of them, as the golden file says."""
    text = filled("clap/text", (4, 48), 2.0)
    images = filled("clap/images", (10, 48), 3.0) + text[LABELS]
    views = [images + filled(f"clap/view/{view}", images.shape, 1.5) for view in range(2)]
    return text, images, views


def build(name: str, backbone: Backbone, **options: Any) -> Learner:
    learner = create_learner(name, backbone, NAMES, **options)
    learner.get_buffer("start").copy_(recipe()[0])
    return learner


def train(learner: Learner, steps: int, **options: Any) -> list[float]:
    views = recipe()[2]
    batches = TensorBatches({"embedding": views, "label": [LABELS, LABELS]}, len(LABELS), seed=1)
    settings = TrainOptions(
        epochs=steps, batch_size=len(LABELS), schedule="constant", warmup_epochs=0, **options
    )
    history = Trainer(learner, batches, settings, callbacks=[]).run().history
    return [record["loss"] for record in history]


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_equals_the_authors_code(case: str, backbone: Backbone) -> None:
    golden = GOLDEN["cases"][case]
    name, _, constraint = case.partition(" ")
    learner = build(name, backbone, **({"constraint": constraint} if constraint else {}))
    _, images, views = recipe()
    learner.survey([Seen(torch.stack(views), LABELS, torch.arange(4))])
    if "pull" in golden:
        close(learner.get_buffer("pull"), golden["pull"])

    loss = sum(learner.loss({"embedding": views[0], "label": LABELS}).values())
    (gradient,) = torch.autograd.grad(loss, [learner.residual])
    close(gradient.flatten()[::7], golden["gradient_every_7th"])

    losses = train(learner, 20, **(ADAM if name == "taskres" else SGD))
    close(torch.tensor(losses), golden["losses"])
    close(learner.class_embeddings().flatten()[::7], golden["weights_every_7th"])
    close(learner.logits(images[:2]).flatten(), golden["logits"])


def test_multipliers_of_three_classes_by_hand(backbone: Backbone) -> None:
    """Two images of the first class, one of the second, none of the third, which gets the mean of the others."""
    learner = create_learner("clap", backbone, NAMES[:3])
    start = F.normalize(learner.get_buffer("start"), dim=-1)
    images = torch.stack([start[0] + 0.5 * start[1], start[1], start[2]])
    learner.survey([Seen(images[None], torch.tensor([0, 1, 0]), torch.arange(3))])

    shares = []
    for image, label in zip(images, (0, 1, 0), strict=True):
        exponentials = [float((backbone.logit_scale * (image / image.norm()) @ text).exp()) for text in start]
        shares.append(exponentials[label] / sum(exponentials))
    first = (shares[0] + shares[2]) / 2
    expected = [first, shares[1], (first + shares[1]) / 2]
    torch.testing.assert_close(learner.get_buffer("pull"), torch.tensor(expected))


def test_classes_in_another_order_are_pulled_alike(backbone: Backbone) -> None:
    _, _, views = recipe()
    first, second = build("clap", backbone), build("clap", backbone)
    first.survey([Seen(torch.stack(views), LABELS, torch.arange(4))])
    order = torch.tensor([2, 0, 3, 1])  # label l of these data is class order[l] of the learner
    second.survey([Seen(torch.stack(views), order.argsort()[LABELS], order)])
    torch.testing.assert_close(first.get_buffer("pull"), second.get_buffer("pull"))


@pytest.mark.parametrize("name", NAMED)
def test_starts_as_zero_shot_of_raw_means(name: str, backbone: Backbone, images: Tensor) -> None:
    templates = ["a photo of a {}.", "an extremely long drawing of several {}."]
    learner = create_learner(name, backbone, NAMES, templates).eval()
    means = []
    for classname in NAMES:
        texts = [template.format(classname) for template in templates]
        means.append(backbone.text.encode_strings(texts).mean(0))
    weights = F.normalize(torch.stack(means), dim=-1)
    expected = backbone.logit_scale * backbone.encode_image(images) @ weights.T
    torch.testing.assert_close(learner(images), expected, rtol=0, atol=1e-4)

    unit = create_learner(name, backbone, NAMES, templates, normalise_start=True)
    torch.testing.assert_close(unit.get_buffer("start").norm(dim=-1), torch.ones(4))


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_a_scaled_residual_is_a_rate(alpha: float, backbone: Backbone) -> None:
    """Plain SGD at a rate of eta on TaskRes is ZS-LP at alpha^2 eta."""
    residual, probe = build("taskres", backbone, alpha=alpha), build("zs_lp", backbone)
    plain = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0}
    train(residual, 15, lr=0.4, **plain)
    train(probe, 15, lr=0.4 * alpha**2, **plain)
    assert bool((probe.residual.abs() > 0.01).any())
    torch.testing.assert_close(residual.class_embeddings(), probe.class_embeddings(), rtol=1e-5, atol=1e-5)


def test_the_pull_keeps_classes_near_their_texts(backbone: Backbone) -> None:
    free, pulled = build("zs_lp", backbone), build("clap", backbone, constraint="balanced")
    train(free, 40, **SGD)
    train(pulled, 40, **SGD)
    assert float(pulled.residual.norm()) < 0.8 * float(free.residual.norm())


@pytest.mark.parametrize("name", NAMED)
def test_trains_on_cached_views(name: str, backbone: Backbone) -> None:
    data = load_dataset("digits", "train", shots=2, seed=1)
    learner = create_learner(name, backbone, data.classnames)
    options = {"epochs": 20, "lr": 0.1, "weight_decay": 0.0, "drop_last": False, "callbacks": []}
    result = fit(learner, data, augmentation="crop_flip:0.5", views=3, **options)
    assert result.history[-1]["cross_entropy"] < result.history[0]["cross_entropy"]
    if name == "clap":
        assert 0 < result.metrics["learned/pull"] < 1
    with pytest.raises(DataError, match=f"{name} learned one set of parameters per class"):
        learner.with_classes(["ring", "cross"])
