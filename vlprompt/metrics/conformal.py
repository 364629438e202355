"""A threshold with a promise: how often scores of clean images reach it, whatever their distribution.

Source: Vovk, Gammerman and Shafer, "Algorithmic Learning in a Random World", 2005, section 2.2 (split conformal
    prediction); Angelopoulos and Bates, arXiv 2107.07511, section 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vlprompt.core.errors import DataError, NonFiniteError

__all__ = ["conformal_threshold", "fewest_scores"]


def fewest_scores(false_alarms: float) -> int:
    """Return how many clean scores a promise of a rate needs: the least n with 1 / (n + 1) <= rate."""
    return max(1, math.ceil(1 / false_alarms - 1 - 1e-9))


def conformal_threshold(clean: Tensor, false_alarms: float) -> float:
    """Return the threshold that a further clean image's score reaches with at most a given probability.

    If the n clean images and the further one are exchangeable (drawn alike, in any order), the further score is
    larger than the k-th smallest of the n with probability at most 1 - k / (n + 1), whatever the scores'
    distribution. k = ceil((n + 1) (1 - rate)) makes that at most the rate. The threshold lies just above that score.

    Args:
        clean: (n,) scores of clean images, larger is more suspicious.
        false_alarms: The rate, in (0, 1); over the draw of the n images and of the further one.

    Raises:
        DataError: If the rate is no share, or there are too few images to promise it: with n of them no threshold that
            is one of their scores is passed with a probability below 1 / (n + 1).
        NonFiniteError: If a score is not a number.
    """
    if not 0 < false_alarms < 1:
        raise DataError(f"the rate of false alarms must lie between 0 and 1, got {false_alarms!r}.")

    count = len(clean)
    fewest = fewest_scores(false_alarms)
    if count < fewest:
        raise DataError(
            f"{count} clean images can't promise a rate of {false_alarms:g}: at least {fewest} are needed. Give more, "
            f"or ask for a rate of {1 / (count + 1):.3g} or more."
        )
    if not bool(clean.isfinite().all()):
        raise NonFiniteError(
            "scores of clean images are no numbers, so they give no threshold. Train the scanner again."
        )

    rank = min(count, math.ceil((count + 1) * (1 - false_alarms) - 1e-9))
    largest_clean = clean.double().sort().values[rank - 1]
    return float(torch.nextafter(largest_clean, torch.tensor(math.inf, dtype=torch.float64)))
