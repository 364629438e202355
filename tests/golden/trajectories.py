"""What the golden tests share that follow a learner over twenty steps of the authors' optimiser."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.golden.visual_learners import agree, check_gradients
from vlprompt.learners import Learner
from vlprompt.training.batches import TensorBatches
from vlprompt.training.options import TrainOptions
from vlprompt.training.trainer import Trainer

__all__ = ["check_start", "check_trajectory"]


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
