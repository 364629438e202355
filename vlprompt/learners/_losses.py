"""Losses over images with several labels."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["binary_cross_entropy"]


def binary_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Return the mean binary cross entropy over all pairs of an image and a class whose truth is known.

    Args:
        logits: (B, C).
        target: (B, C): 1 where an image shows a class, 0 where it does not, -1 where nobody can say.
    """
    truth = target.clamp(min=0).to(logits.dtype)
    losses = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    known = (target >= 0).to(logits.dtype)
    # Each image counts alike, so that micro-batches of any size add up to the batch.
    return ((losses * known).sum(1) / known.sum(1).clamp(min=1)).mean()
