"""Telling known images from strangers by a score; every figure is a fraction in [0, 1].

The higher a score, the more an image looks like one of the known classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlprompt.core.errors import DataError, NonFiniteError

__all__ = ["auroc", "average_precision", "false_positives_at_95", "open_set_rate"]


def auroc(known: Tensor, strangers: Tensor) -> float:
    """Return the probability that a known image scores above a stranger, ties counted half.

    Args:
        known: (n,) scores.
        strangers: (m,) scores.

    Raises:
        DataError: If either is empty.
        NonFiniteError: If a score is NaN.
    """
    from sklearn.metrics import roc_auc_score  # takes a second, which a prediction would wait for

    truth, scores = _joined(known, strangers)
    return float(roc_auc_score(truth.numpy(), scores.numpy()))


def average_precision(known: Tensor, strangers: Tensor) -> float:
    """Return the area under precision over recall, known images being the positives (AUPR-in)."""
    from sklearn.metrics import average_precision_score  # takes a second, which a prediction would wait for

    truth, scores = _joined(known, strangers)
    return float(average_precision_score(truth.numpy(), scores.numpy()))


def false_positives_at_95(known: Tensor, strangers: Tensor, rate: float = 0.95) -> float:
    """Return the share of strangers that pass the highest threshold which at least 95 % of the known images pass.

    Args:
        known: (n,) scores; an image passes if its score is at least the threshold.
        strangers: (m,) scores.
        rate: Share of known images that must pass, in (0, 1].
    """
    _joined(known, strangers)
    ranked = known.double().sort(descending=True).values
    # 0.95 * 20 is 19.000000000000004 in floating point.
    needed = max(1, -int(-(rate * len(ranked) - 1e-9) // 1))
    return float((strangers.double() >= ranked[needed - 1]).double().mean())


def open_set_rate(known: Tensor, right: Tensor, strangers: Tensor) -> float:
    """Return the area under the share of known images that pass and are named rightly, over that of passing strangers.

    OSCR: Dhamija et al., "Reducing Network Agnostophobia", NeurIPS 2018.

    Args:
        known: (n,) scores.
        right: (n,) whether each known image was named rightly.
        strangers: (m,) scores.
    """
    _joined(known, strangers)
    scores = torch.cat([known, strangers]).double()
    thresholds = scores.unique().flip(0)
    # From the strictest threshold, which nothing passes, to the mildest, which everything passes.
    passed = (known.double()[right.bool()].sort().values, strangers.double().sort().values)
    rates = []
    for values, count in zip(passed, (len(known), len(strangers)), strict=True):
        below = torch.searchsorted(values, thresholds)
        rates.append(torch.cat([torch.zeros(1, dtype=torch.double), (len(values) - below).double() / count]))
    named, false = rates
    return float(torch.trapezoid(named, false))


def _joined(known: Tensor, strangers: Tensor) -> tuple[Tensor, Tensor]:
    """Return (n + m,) truth and scores."""
    if not len(known) or not len(strangers):
        raise DataError(
            f"scores of known images and of strangers are compared; got {len(known)} and {len(strangers)}."
        )
    scores = torch.cat([known, strangers]).double()
    if bool(scores.isnan().any()):
        raise NonFiniteError("a score is NaN.")
    truth = torch.cat([torch.ones(len(known)), torch.zeros(len(strangers))])
    return truth, scores
