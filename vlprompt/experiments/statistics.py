"""Means and intervals over seeds, paired comparisons, and the harmonic mean of base and new accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from vlprompt.core.errors import DataError

__all__ = ["Summary", "harmonic_mean", "harmonic_mean_of_averages", "paired_difference", "summarise"]


@dataclass(frozen=True)
class Summary:
    """A quantity over independent runs, in the unit of the values.

    Attributes:
        mean: Arithmetic mean.
        std: Sample standard deviation (n - 1 in the denominator); None for a single run.
        ci95: Half-width of the 95 % Student-t interval of the mean; None for a single run.
        n: Number of runs.
    """

    mean: float
    std: float | None
    ci95: float | None
    n: int

    def flat(self, key: str) -> dict[str, float]:
        """Return ``key``, ``key_std`` and ``key_ci95``; the last two only where they are known."""
        spread = {f"{key}_std": self.std, f"{key}_ci95": self.ci95}
        return {key: self.mean, **{k: v for k, v in spread.items() if v is not None}}


def summarise(values: Sequence[float]) -> Summary:
    """Summarise one value per seed.

    Raises:
        DataError: If there are no values.
    """
    if len(values) == 0:
        raise DataError("no values to summarise.")

    data = np.asarray(values, dtype=float)
    if len(data) == 1:  # one run says nothing about the spread; a zero would claim it does
        return Summary(float(data[0]), None, None, 1)

    std = float(data.std(ddof=1))
    half = float(stats.t.ppf(0.975, len(data) - 1)) * std / len(data) ** 0.5
    return Summary(float(data.mean()), std, half, len(data))


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> Summary:
    """Summarise ``ours - theirs`` where both ran the same seeds in the same order.

    The seeds' common ups and downs cancel, so the interval is narrower than that of two separate means; the
    difference is significant at 5 % when the interval leaves out 0.

    Raises:
        DataError: If the lengths differ.
    """
    if len(ours) != len(theirs):
        raise DataError(f"a paired difference needs equally many values, got {len(ours)} and {len(theirs)}.")
    return summarise([a - b for a, b in zip(ours, theirs, strict=True)])


def harmonic_mean(base: float, new: float) -> float:
    """Return the harmonic mean of two accuracies (Xian et al., CVPR 2017); 0 when either is 0."""
    return 2 * base * new / (base + new) if base + new > 0 else 0.0


def harmonic_mean_of_averages(base: Sequence[float], new: Sequence[float]) -> float:
    """Return the harmonic mean of the two averages over data sets.

    This is what the "average" row of published base-to-new tables holds (Zhou et al., CVPR 2022, table 1); it
    is not the average of the harmonic means.
    """
    return harmonic_mean(summarise(base).mean, summarise(new).mean)
