"""One step of the real trainer, by plain gradient descent, so that the change of the parameters is the gradient."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor

from vlprompt.core.trainable import Trainable
from vlprompt.training.batches import TensorBatches
from vlprompt.training.options import TrainOptions
from vlprompt.training.trainer import Trainer

__all__ = ["learned", "relative", "take_step"]


def take_step(
    module: Trainable,
    batch: Mapping[str, Tensor],
    start: Mapping[str, Tensor] | None = None,
    *,
    lr: float = 1.0,
    seed: int = 1,
    parts: int = 1,
    accelerator: Accelerator | None = None,
) -> None:
    """Take one step on one batch.

    Args:
        module: What the trainer trains.
        batch: With ``"label"``.
        start: Values that its parameters get first, by name.
        lr: Rate.
        seed: Of what the method draws.
        parts: Micro-batches.
        accelerator: Made anew if not given.
    """
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if start is not None and name in start:
                parameter.copy_(start[name])

    size = len(batch["label"])
    options = TrainOptions(
        epochs=1,
        batch_size=size,
        lr=lr,
        momentum=0,
        weight_decay=0,
        schedule="constant",
        warmup_epochs=0,
        accumulation=parts,
        seed=seed,
    )
    batches = TensorBatches({n: [t] for n, t in batch.items()}, size, seed)
    Trainer(module, batches, options, callbacks=[], accelerator=accelerator or Accelerator()).run()


def learned(module: Trainable) -> dict[str, Tensor]:
    """Return copies of a module's learned parameters by name."""
    return {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}


def relative(ours: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> float:
    """Return |a - b| / |b|, norms over all tensors of both."""
    squares = [((ours[n] - t).double().square().sum(), t.double().square().sum()) for n, t in others.items()]
    difference, size = (torch.stack(list(parts)).sum() for parts in zip(*squares, strict=True))
    return float((difference / size.clamp(min=1e-30)).sqrt())
