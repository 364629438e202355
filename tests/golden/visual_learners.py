"""What the golden tests of learners with visual prompts share."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.golden.weights import clip_state, filled
from vlprompt import create_backbone
from vlprompt.backbones import Backbone
from vlprompt.learners import Learner

__all__ = ["agree", "check_case", "check_gradients", "put", "vit_b16"]


@cache
def vit_b16() -> Backbone:
    """ViT-B/16 with the recipe's weights, built once for all tests. Nothing may change it."""
    built = create_backbone("ViT-B-16", quick_gelu=True)
    shapes = {name: tensor.shape for name, tensor in built.model.state_dict().items()}
    built.model.load_state_dict(clip_state(shapes))
    return built


def put(case: str, parameters: dict[str, float], learner: Learner) -> None:
    """Fill learned tensors from their names (see the recipes): name to standard deviation."""
    state = dict(learner.named_parameters())
    with torch.no_grad():
        for name, std in parameters.items():
            mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            state[name].copy_(filled(f"{case}/{name}", state[name].shape, std, mean))


def check_case(golden: dict[str, Any], case: str, learner: Learner) -> None:
    """Compare logits, loss and gradients of the recipe's images with a golden file's case."""
    expected = golden["cases"][case]
    logits = learner(filled("images", (3, 3, *learner.backbone.image_size), 1.0))
    loss = F.cross_entropy(logits, torch.tensor(golden["labels"]))
    loss.backward()
    agree("logits", logits, torch.tensor(expected["logits"]), 1e-4)
    agree("loss", loss, torch.tensor(expected["loss"]), 1e-4)
    check_gradients(expected["gradients"], learner)


def check_gradients(expected: dict[str, Any], learner: Learner) -> None:
    """Compare gradients within 1e-4 of each tensor's largest."""
    parameters = dict(learner.named_parameters())
    for name, kept in expected.items():
        gradient, values = parameters[name].grad, torch.tensor(kept["values"])
        assert list(gradient.shape) == kept["shape"]
        agree(name, gradient.flatten()[:: kept["every"]], values, 1e-4 * float(values.abs().max()))
        agree(name, gradient.norm(), torch.tensor(kept["norm"]), 1e-4 * kept["norm"])


def agree(what: str, got: Tensor, expected: Tensor, atol: float) -> None:
    """Check that values agree within ``atol``."""
    torch.testing.assert_close(got.detach(), expected, rtol=0, atol=atol, msg=lambda text: f"{what}: {text}")
