"""The reconstruction of EPT: its start, its equations against a loop, what moves, what it folds into."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vlprompt
from tests.golden.visual_learners import put
from tests.golden.weights import filled
from vlprompt.backbones import Backbone

build: Any = vlprompt.create_learner  # whose results have members of their own
NAMES = ["dog", "red circle", "American staffordshire terrier"]


def disturbed(backbone: Backbone, **options: Any) -> Any:
    learner = build("ept", backbone, NAMES, **options)
    put("ept", dict.fromkeys(learner.learned_parameters(), 0.3), learner)
    return learner.eval()


@pytest.mark.parametrize("mode", ["place", "token"])
def test_it_starts_as_coop_with_the_same_vectors(mode: str, backbone: Backbone, images: Tensor) -> None:
    learner = build("ept", backbone, NAMES, offset_mode=mode).eval()
    expected = build("coop", backbone, NAMES, context_length=4).eval()(images)
    torch.testing.assert_close(learner(images), expected, rtol=0, atol=1e-5)
    assert learner.figures()["gate_entropy"] == pytest.approx(math.log(4))


@pytest.mark.parametrize("gate", ["prompt", "row"])
def test_the_context_is_what_a_loop_makes(gate: str, backbone: Backbone) -> None:
    learner = disturbed(backbone, gate=gate, spaces=3, width=5, temperature=2.0)
    fusion, context, matrix = learner.fusion, learner.context, learner.offsets.right
    read = []
    for row in context:
        query = row @ fusion.attention["query"]
        scores = torch.stack(
            [query @ (other @ fusion.attention["key"]) / 5**0.5 for other in matrix]
        ).softmax(0)
        value = sum(s * (other @ fusion.attention["value"]) for s, other in zip(scores, matrix, strict=True))
        read.append(row + value @ fusion.attention["out"])
    mean = sum(read) / len(read)

    for row, got in zip(read, learner.fused_context(), strict=True):
        gates = ((row if gate == "row" else mean) @ fusion.gate / 2.0).softmax(0)
        expected = torch.zeros_like(row)
        for k in range(3):
            expected = expected + gates[k] * (row + F.gelu(row @ fusion.down[k]) @ fusion.up[k])
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_one_space_without_fusion_is_a_residual_prompt(backbone: Backbone) -> None:
    learner = disturbed(backbone, spaces=1, fusion=False)
    expected = learner.context + F.gelu(learner.context @ learner.fusion.down[0]) @ learner.fusion.up[0]
    torch.testing.assert_close(learner.fused_context(), expected)
    assert not [name for name in learner.learned_parameters() if "attention" in name]


def test_after_three_steps_everything_has_moved(backbone: Backbone, images: Tensor) -> None:
    learner = build("ept", backbone, NAMES).train()
    start = {name: tensor.clone() for name, tensor in learner.trainable_state().items()}
    optimizer = torch.optim.SGD(learner.learned_parameters().values(), lr=0.1)
    embeddings = filled("embeddings", (6, backbone.dim), 1.0)
    for _ in range(3):
        optimizer.zero_grad()
        loss = learner.loss({"embedding": embeddings, "label": torch.tensor([0, 1, 2, 0, 1, 2])})
        loss["cross_entropy"].backward()
        optimizer.step()
    for name, tensor in learner.trainable_state().items():
        assert not torch.equal(tensor, start[name]), name


@pytest.mark.parametrize("mode", ["place", "token", "class"])
def test_it_folds_into_dept(mode: str, backbone: Backbone, images: Tensor) -> None:
    learner = disturbed(backbone, offset_mode=mode, position="front", offset_over="name")
    folded = learner.fold()
    assert folded.title() == "dept"
    torch.testing.assert_close(folded(images), learner(images), rtol=0, atol=1e-4)
    assert set(folded.learned_parameters()) < set(learner.learned_parameters())
