"""Figures of incremental learning, from what each session's classes reach after each session.

``reached[t][s]`` is the measure on the classes of session s after session t, for s <= t; fractions in, fractions out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["backward_transfer", "forgetting"]

Reached = Sequence[Sequence[float]]


def forgetting(reached: Reached) -> float:
    """Return how much the earlier sessions lost on average since they were at their best; 0 for one session.

    Chaudhry et al., "Riemannian Walk for Incremental Learning", ECCV 2018, equation 3: the mean over s < T of
    max over t < T of ``reached[t][s]`` minus ``reached[T][s]``. Negative where they went on rising.
    """
    last = len(reached) - 1
    losses = [max(reached[t][s] for t in range(s, last)) - reached[last][s] for s in range(last)]
    return float(np.mean(losses)) if losses else 0.0


def backward_transfer(reached: Reached) -> float:
    """Return what later sessions added to earlier ones on average; 0 for one session.

    Lopez-Paz and Ranzato, "Gradient Episodic Memory", NeurIPS 2017, section 2: the mean over s < T of
    ``reached[T][s]`` minus ``reached[s][s]``.
    """
    last = len(reached) - 1
    gains = [reached[last][s] - reached[s][s] for s in range(last)]
    return float(np.mean(gains)) if gains else 0.0
