"""What the tests of mask tuning share."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from vlprompt import create_learner, fit
from vlprompt.backbones import Backbone
from vlprompt.data import ImageDataset
from vlprompt.learners import Learner

NAMES = ["dog", "red circle", "hummingbird", "boeing 737-800"]
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])
FORMS = ("amt", "mmt", "pmt")
TOWERS: dict[str, dict[str, Any]] = {
    "vit": {},
    "timm": {"vision": {"timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": "linear",
                        "timm_model_pretrained": False}, "custom": True},
    "resnet": {"vision": {"layers": (1, 1, 1, 1), "width": 16, "head_width": 16}},
}  # fmt: skip
# Adam without decay at a rate that can switch weights off in a few steps.
RECIPE: dict[str, Any] = {
    "optimizer": "adamw", "weight_decay": 0.0, "schedule": "constant", "warmup_epochs": 0.0, "callbacks": [],
}  # fmt: skip


def scatter(learner: Learner, share: float = 0.2, seed: int = 3) -> Learner:
    """Switch some weights off."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for score in learner.scores.values():
            score[torch.rand(score.shape, generator=generator) < share] = 0.001
    return learner


def obvious(learner: Learner, scores: dict[str, Tensor], images: Tensor) -> Tensor:
    """Embeddings of a copy of the tower whose weights are products, all made at once; straight-through by hand."""
    visual = copy.deepcopy(learner.backbone.vision.visual)
    weights = {}
    for name, score in scores.items():
        hard = (score.detach() > learner.threshold).float()
        weights[name] = visual.get_parameter(name).detach() * (hard + score - score.detach())
    return torch.func.functional_call(visual, weights, (images,))


def named_scores(learner: Learner) -> dict[str, Tensor]:
    return {key.replace("/", "."): score for key, score in learner.scores.items()}


def train(backbone: Backbone, data: ImageDataset, form: str = "ramt", epochs: int = 3, lr: float = 3e-3,
          fit_options: dict[str, Any] | None = None, **options: Any) -> Learner:  # fmt: skip
    learner = create_learner(form, backbone, data.classnames, data.templates, **options)
    fit(learner, data, epochs=epochs, lr=lr, batch_size=10, **RECIPE, **(fit_options or {}))
    return learner


def scores_of(learner: Learner) -> Tensor:
    return torch.cat([s.detach().flatten() for s in learner.scores.values()])
