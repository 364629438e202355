"""Every learner's losses and predictions are one graph: torch.compile finds no break, torch.export no gap."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vlprompt.backbones import Backbone
from vlprompt.learners import LEARNERS, Learner, create_learner

NAMES = ("dog", "red circle", "hummingbird", "boeing 737-800")
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])
QUICK = ("coop", "maple")  # a method of text and one of both towers; the others are slow tests
# Looks at the first convolution through a hook, which a graph can't hold; it trains on cached rows.
HOOKED = ("dbom",)


def build(name: str, backbone: Backbone, images: Tensor) -> Learner:
    learner = create_learner(name, backbone, NAMES)
    if learner.prepares:
        learner.prepare(backbone.image_embeddings(images)[None], LABELS)
    return learner


def batch_of(learner: Learner, images: Tensor) -> dict[str, Tensor]:
    """Return what training reads: cached rows where they are static, the kept states of the stem where there are."""
    rest = {"label": LABELS, "index": torch.arange(len(LABELS))}
    if learner.static_images:
        return {"embedding": learner.embed_images(images), **rest}
    return {"image": images, "frozen": learner.backbone.image_embeddings(images), **rest}


def gradients(learner: Learner, losses: dict[str, Tensor]) -> dict[str, Tensor]:
    learner.zero_grad()
    total = torch.stack(list(losses.values())).sum()
    if total.requires_grad:
        total.backward()
    return {name: p.grad for name, p in learner.learned_parameters().items() if p.grad is not None}


@pytest.fixture(autouse=True)
def fresh_graphs() -> None:
    torch._dynamo.reset()


def learners(*left_out: str) -> list[Any]:
    """Return all names, but for some; most of them marked slow."""
    names = [name for name in LEARNERS.names() if name not in left_out]
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", learners())
def test_losses_are_one_graph(name: str, backbone: Backbone, images: Tensor) -> None:
    learner = build(name, backbone, images).train()
    batch: dict[str, Any] = batch_of(learner, images)

    torch.manual_seed(0)
    expected = learner.loss(batch)  # also computes what is computed once for a whole run
    expected_gradients = gradients(learner, expected)

    compiled = torch.compile(learner.loss, fullgraph=True, backend="eager")
    torch.manual_seed(0)
    losses = compiled(batch)
    assert losses.keys() >= expected.keys()
    for key, value in losses.items():  # what is left out without a graph because it is 0 is computed in one
        torch.testing.assert_close(value, expected.get(key, torch.tensor(0.0)), rtol=1e-4, atol=1e-5)
    for key, value in gradients(learner, losses).items():
        torch.testing.assert_close(value, expected_gradients[key], rtol=1e-3, atol=1e-5)

    states = learner.frozen_stages()
    if states and not learner.static_images:
        torch.manual_seed(0)
        losses = compiled({**batch, "image": learner.frozen_states(images)})
        for key, value in losses.items():
            torch.testing.assert_close(value, expected.get(key, torch.tensor(0.0)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", learners(*HOOKED))
def test_predictions_are_one_graph(name: str, backbone: Backbone, images: Tensor) -> None:
    learner = build(name, backbone, images).eval()
    with torch.no_grad():
        expected = learner(images)
        compiled = torch.compile(learner, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(images), expected, rtol=0, atol=1e-4)
