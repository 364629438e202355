"""What the golden tests share that follow a learner over twenty steps of the authors' optimiser."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.golden.visual_learners import agree, check_gradients
from tests.golden.weights import filled
from vlprompt.learners import Learner
from vlprompt.training.batches import TensorBatches
from vlprompt.training.callbacks import Callback, TrainingView
from vlprompt.training.options import TrainOptions
from vlprompt.training.trainer import Trainer

__all__ = ["check_start", "check_trajectory", "golden_images", "train_twenty_steps"]


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


def check_start(golden: dict[str, Any], learner: Learner, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Compare loss, logits and gradients, within 1e-4 of the largest value; return the losses by name."""
    losses = learner.train().loss(batch)
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    _agree("loss", total, golden["loss"], 1e-4)
    _agree("logits", learner.eval().batch_logits(batch), golden["logits"], 1e-4)
    check_gradients(golden["gradients"], learner)
    return losses


def check_trajectory(
    golden: dict[str, Any], learner: Learner, batch: dict[str, Tensor], **options: Any
) -> None:
    """Train for as many steps as there are losses, all on one batch; compare within 1e-3 of the largest value.

    Args:
        golden: ``losses`` before each step; ``logits`` and ``learned`` after the last.
        learner: At its start.
        batch: What every step reads.
        options: Of the training; the rate stays constant.
    """
    size = len(batch["label"])
    steps = TensorBatches({name: [tensor] for name, tensor in batch.items()}, size, seed=1)
    settings = TrainOptions(
        epochs=len(golden["losses"]), batch_size=size, schedule="constant", warmup_epochs=0, **options
    )
    with torch.random.fork_rng():
        history = Trainer(learner, steps, settings, callbacks=[]).run().history

    _agree("losses", torch.tensor([record["loss"] for record in history]), golden["losses"], 1e-3)
    _agree("logits", learner.eval().batch_logits(batch), golden["logits"], 1e-3)
    state = learner.trainable_state()
    for name, kept in golden["learned"].items():
        _agree(name, state[name].flatten()[:: kept["every"]], kept["values"], 1e-3)


def _agree(what: str, got: Tensor, expected: Any, share: float) -> None:
    values = torch.tensor(expected)
    agree(what, got, values, share * float(values.abs().max()))
