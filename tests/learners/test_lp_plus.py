"""LP++: the authors' numbers, step sizes that can't overshoot, and a start that does not grow with the views."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.golden.text_learners import read_golden
from tests.golden.weights import filled
from vlprompt.backbones import Backbone
from vlprompt.learners import Learner, create_learner
from vlprompt.learners.lp_plus import step_sizes

GOLDEN = read_golden("lp_plus_small")
NAMES = ["dog", "red circle", "hummingbird", "tree"]
AS_PUBLISHED = {"accumulate": True, "bias": True}
CENTRE = filled("lp/centre", (4, 48), 1.0)
LABELS = torch.arange(16) % 4
TRAIN = (CENTRE[LABELS] + filled("lp/images", (16, 48), 4.0), LABELS)
VAL = (CENTRE[LABELS[:12]] + filled("lp/val", (12, 48), 4.0), LABELS[:12])


def build(backbone: Backbone, **options: Any) -> Learner:
    learner = create_learner("lp_plus", backbone, NAMES, **options)
    learner.get_buffer("texts").copy_(F.normalize(CENTRE + filled("lp/text", (4, 48), 1.5), dim=-1))
    return learner


def loss_of(learner: Learner, samples: tuple[Tensor, Tensor]) -> float:
    with torch.no_grad():
        return float(F.cross_entropy(learner.logits(samples[0]), samples[1]))


def test_rates_and_start_are_the_authors(backbone: Backbone) -> None:
    golden = GOLDEN["cases"]["20 steps"]
    learner = build(backbone)
    features = F.normalize(TRAIN[0], dim=-1)
    assert step_sizes(features, learner.get_buffer("texts")) == pytest.approx(
        (golden["rate"], golden["alpha_rate"]), rel=1e-5
    )
    largest = np.linalg.eigvalsh((features.T @ features).double().numpy())[-1]
    assert step_sizes(features, learner.get_buffer("texts"))[0] == pytest.approx(4 * 16 / largest)


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_equals_the_authors_code(case: str, backbone: Backbone) -> None:
    golden = GOLDEN["cases"][case]
    learner = build(backbone, steps=golden["steps"], **AS_PUBLISHED)
    learner.solve(TRAIN, None)
    for name, expected in (("bias", golden["bias"]), ("alpha", golden["alpha"])):
        values = getattr(learner, name).detach()
        torch.testing.assert_close(values, torch.tensor(expected), rtol=1e-4, atol=1e-3)
    weights = learner.weight.detach().flatten()[::7]
    torch.testing.assert_close(weights, torch.tensor(golden["weight_every_7th"]), rtol=1e-4, atol=1e-3)

    chosen = build(backbone, steps=golden["steps"], **AS_PUBLISHED).solve(TRAIN, VAL)
    assert chosen == {
        "step": golden["best_step"] + 1,
        "val_accuracy": pytest.approx(golden["best_accuracy"]),
    }


@pytest.mark.parametrize("number", [0, 1, 2, 5, 19])
def test_losses_along_the_way_are_the_authors(number: int, backbone: Backbone) -> None:
    learner = build(backbone, steps=max(number, 1), **AS_PUBLISHED)
    learner.solve(TRAIN, None)
    expected = GOLDEN["cases"]["20 steps"]["losses"]
    assert loss_of(learner, TRAIN) == pytest.approx(expected[max(number, 1)], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_steps_by_autograd(accumulate: bool, bias: bool, backbone: Backbone) -> None:
    """The obvious loop: torch's SGD for w and the bias, a gradient of alpha that is cleared or not."""
    ours = build(backbone, steps=45, accumulate=accumulate, bias=bias)
    ours.solve(TRAIN, None)

    slow = build(backbone, steps=1, alpha_every=0, accumulate=accumulate, bias=bias)
    slow.solve(TRAIN, None)
    features = F.normalize(TRAIN[0], dim=-1)
    with torch.no_grad():
        slow.weight.copy_(torch.stack([features[label == LABELS].sum(0) for label in range(4)]))
        own = (features * slow.get_buffer("texts")[LABELS]).sum(-1)
        slow.alpha.fill_(250 * own.mean())
        if bias:
            slow.bias.zero_()
    rate, alpha_rate = step_sizes(features, slow.get_buffer("texts"))
    optimizer = torch.optim.SGD([slow.weight, *([slow.bias] if bias else [])], lr=rate, momentum=0.9)
    for step in range(1, 46):
        optimizer.zero_grad()
        if not accumulate:
            slow.alpha.grad = None
        F.cross_entropy(slow.logits(TRAIN[0]), LABELS).backward()
        optimizer.step()
        if step % 10 == 0:
            slow.alpha.data -= alpha_rate * slow.alpha.grad
    torch.testing.assert_close(ours.weight, slow.weight, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(ours.alpha, slow.alpha, rtol=1e-4, atol=1e-3)


def test_without_momentum_the_loss_never_rises(backbone: Backbone) -> None:
    losses = []
    for steps in range(1, 25):
        learner = build(backbone, steps=steps, momentum=0.0, alpha_every=0)
        learner.solve(TRAIN, None)
        losses.append(loss_of(learner, TRAIN))
    assert all(later <= earlier + 1e-6 for earlier, later in itertools.pairwise(losses))
    assert losses[-1] < losses[0]


def test_views_that_are_equal_change_nothing(backbone: Backbone) -> None:
    single, triple = build(backbone, steps=30), build(backbone, steps=30)
    single.solve(TRAIN, None)
    triple.solve((TRAIN[0].repeat(3, 1), LABELS.repeat(3)), None, views=3)
    torch.testing.assert_close(triple.weight, single.weight, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(triple.alpha, single.alpha, rtol=1e-4, atol=1e-3)


def test_the_step_is_chosen_on_validation_data_and_the_last_of_equals(backbone: Backbone) -> None:
    learner = build(backbone, steps=40)
    chosen = learner.solve(TRAIN, VAL)

    accuracies = []
    for steps in range(1, 41):
        other = build(backbone, steps=steps)
        other.solve(TRAIN, None)
        with torch.no_grad():
            accuracies.append(float((other.logits(VAL[0]).argmax(-1) == VAL[1]).double().mean()))
    best = max(accuracies)
    last = max(number for number, accuracy in enumerate(accuracies, start=1) if accuracy == best)
    assert chosen == {"step": last, "val_accuracy": best}


def test_without_validation_data_the_last_step_is_taken(
    backbone: Backbone, caplog: pytest.LogCaptureFixture
) -> None:
    assert build(backbone, steps=7).solve(TRAIN, None) == {"step": 7}
    assert "no validation data, so the last of 7 steps is taken" in caplog.text


def test_unbalanced_classes_and_one_without_samples(backbone: Backbone) -> None:
    labels = TRAIN[1].clone()
    keep = labels != 2
    keep[:3] = False
    learner = build(backbone)
    learner.solve((TRAIN[0][keep], labels[keep]), None)
    with torch.no_grad():
        guesses = learner.logits(TRAIN[0]).argmax(-1)
    assert bool((guesses[keep] == labels[keep]).all())
    assert not bool((guesses[keep] == 2).any())
