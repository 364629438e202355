"""CoOp's logits and gradient equal those of the authors' code on the same weights (see the JSON's recipe).

Largest differences when the file was made: 1.4e-5 in the logits, 8e-6 in the gradients.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.golden.weights import clip_state, filled
from vlprompt import create_backbone, create_learner
from vlprompt.backbones import Backbone

HERE = Path(__file__).parent
GOLDEN = json.loads((HERE / "coop_vit_b16.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    built = create_backbone("ViT-B-16", quick_gelu=True)
    shapes = {name: tensor.shape for name, tensor in built.model.state_dict().items()}
    built.model.load_state_dict(clip_state(shapes))
    return built


@pytest.fixture(scope="module")
def embeddings(backbone: Backbone) -> torch.Tensor:
    return backbone.image_embeddings(filled("images", (3, 3, 224, 224), 1.0))


def test_the_weights_are_the_ones_of_the_recipe() -> None:
    values = filled("images", (4,), 1.0).tolist()
    assert values == pytest.approx(GOLDEN["first_image_values"], abs=1e-7)


@pytest.mark.parametrize("case", GOLDEN["cases"])
def test_logits_and_context_gradient(case: str, backbone: Backbone, embeddings: torch.Tensor) -> None:
    golden: dict[str, Any] = GOLDEN["cases"][case]
    learner = create_learner("coop", backbone, GOLDEN["classnames"], **golden["options"]).train()
    assert list(learner.context.shape) == golden["gradient_shape"]
    if not golden["options"]["init"]:
        with torch.no_grad():
            learner.context.copy_(filled(f"context/{case}", learner.context.shape, 0.02))

    logits = learner.logits(embeddings)
    loss = F.cross_entropy(logits, torch.tensor(GOLDEN["labels"]))
    loss.backward()
    gradient = learner.context.grad

    close(logits, golden["logits"], 1e-4)
    close(loss, golden["loss"], 1e-4)
    close(gradient.norm(dim=-1), golden["gradient_norms"], 1e-4)
    if "gradient" in golden:
        close(gradient, golden["gradient"], 1e-4)
    else:
        close(gradient.flatten()[::61], golden["gradient_every_61st"], 1e-4)


def close(got: torch.Tensor, expected: Any, atol: float) -> None:
    torch.testing.assert_close(got.detach(), torch.tensor(expected), rtol=0, atol=atol)
