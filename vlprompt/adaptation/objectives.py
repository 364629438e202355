"""Losses of test-time adaptation: functions of logits and class weights, one value per sample."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["dispersion", "marginal_entropy"]


def marginal_entropy(logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the entropy, in nats, of the mean of the kept views' probabilities.

    Shu et al., "Test-Time Prompt Tuning", NeurIPS 2022, equation 2 (after Zhang et al., MEMO, 2110.09506).

    Args:
        logits: (..., V, C).
        mask: (..., V), True for the views that count, at least one each; None for all of them.

    Returns:
        (...).
    """
    # In logarithms throughout: a mean of tiny probabilities would underflow before its logarithm is taken.
    log_probs = logits.log_softmax(-1)
    if mask is None:
        mean = log_probs.logsumexp(-2) - math.log(logits.shape[-2])
    else:
        log_probs = log_probs.masked_fill(~mask[..., None], -torch.inf)
        mean = log_probs.logsumexp(-2) - mask.sum(-1, keepdim=True).log()

    # Without a lower bound, 0 * log 0 would be NaN in place of 0.
    mean = mean.clamp(min=torch.finfo(mean.dtype).min)
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
