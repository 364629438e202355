"""Training whole towers in mixed precision: products in bfloat16, weights and their sums in float32."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vlprompt.core.trainable import Batch, Trainable, TransparentWrapper

__all__ = ["Mixed", "mixed"]

Mixed = Literal["fp32", "bf16"]
"""What the products of a forward pass are computed in."""


class _Mixed(TransparentWrapper):
    def __init__(self, module: Trainable) -> None:
        self.module = module

    @property
    def wrapped(self) -> Trainable:
        return self.module

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        device = next(iter(self.learned_parameters().values())).device
        with torch.autocast(device.type, torch.bfloat16):
            return self.module.loss(batch)


def mixed(module: Trainable, precision: Mixed) -> Trainable:
    """Return what the trainer trains in place of a module: its losses are computed under autocast if asked for."""
    return module if precision == "fp32" else _Mixed(module)
