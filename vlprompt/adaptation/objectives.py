"""What test-time adaptation minimises, as functions of logits and class weights, one value per sample."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["dispersion", "marginal_entropy"]


def marginal_entropy(logits: Tensor, kept: Tensor | None = None) -> Tensor:
    """Return the entropy, in nats, of the mean of the kept views' probabilities.

    Shu et al., "Test-Time Prompt Tuning", NeurIPS 2022, equation 2 (after Zhang et al., MEMO, 2110.09506).

    Args:
        logits: (..., V, C).
        kept: (..., V) mask of the views that count, at least one each; all of them if None.

    Returns:
        (...).
    """
    log_probs = logits.log_softmax(-1)
    if kept is None:
        mean = log_probs.logsumexp(-2) - math.log(logits.shape[-2])
    else:
        log_probs = log_probs.masked_fill(~kept[..., None], -torch.inf)
        mean = log_probs.logsumexp(-2) - kept.sum(-1, keepdim=True).log()
    mean = mean.clamp(min=torch.finfo(mean.dtype).min)  # 0 * log 0 is 0
    return -(mean.exp() * mean).sum(-1)


def dispersion(weights: Tensor) -> Tensor:
    """Return the average distance of the class weights from their mean (ATFD; the larger, the better calibrated).

    Yoon et al., "C-TPT", ICLR 2024, equation 4.

    Args:
        weights: (..., C, d) unit-length class weights.

    Returns:
        (...).
    """
    return (weights - weights.mean(-2, keepdim=True)).norm(dim=-1).mean(-1)
