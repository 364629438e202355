"""Twenty steps of a golden file through the real trainer."""

from __future__ import annotations

from typing import Any

import torch

from tests.golden.weights import filled
from vlprompt.learners import Learner
from vlprompt.training.batches import TensorBatches
from vlprompt.training.callbacks import Callback, TrainingView
from vlprompt.training.options import TrainOptions
from vlprompt.training.trainer import Trainer

__all__ = ["golden_images", "train_twenty_steps"]


class _Losses(Callback):
    """Keeps the sum of the losses of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_step(self, trainer: TrainingView, losses: dict[str, float]) -> None:
        self.values.append(losses["loss"])


def golden_images(learner: Learner, view: int | None = None) -> torch.Tensor:
    """Return (3, 3, H, W) images of the recipe; with a number, those of the steps."""
    name = "images" if view is None else f"images/{view}"
    return filled(name, (3, 3, *learner.backbone.image_size), 1.0)


def train_twenty_steps(learner: Learner, labels: list[int], **options: Any) -> list[float]:
    """Train on whole batches of two views in turns; return the loss before each step."""
    defaults = {"steps": 20, "batch_size": 3, "warmup_epochs": 0, "schedule": "constant"}
    checked = TrainOptions(**{**defaults, **options})
    views = [golden_images(learner, view) for view in (0, 1)]
    batches = TensorBatches({"image": views, "label": [torch.tensor(labels)]}, 3, checked.seed)
    watch = _Losses()
    Trainer(learner, batches, checked, callbacks=[watch]).run()
    learner.eval()
    return watch.values
