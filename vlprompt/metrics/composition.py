"""Seen against unseen compositions: accuracy over a bias on unseen ones, as in compositional zero-shot learning.

A bias is added to the scores of unseen compositions. At minus infinity only seen ones are predicted, at plus infinity
only unseen ones. Between lies a curve of (accuracy on unseen, accuracy on seen). ``exact`` visits every bias at which
the answer for some image changes; ``parity`` visits the biases of the reference code, so that numbers compare.

Reference for parity: Forest-art/DFSP test.py (accuracies per sample, some twenty biases, no point at minus infinity).
Differs from it: the caller's scores stay as they are, nothing fails where no unseen sample is right, and compositions
that don't occur are ruled out by minus infinity.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vlprompt.core.errors import DataError

__all__ = ["Sweep", "bias_sweep", "open_world_accuracy"]

_HUGE = 1e3  # the reference's stand-in for plus infinity
_MARGIN = 1e-4
_BINS = 20
Mode = Literal["exact", "parity"]


class Sweep(dict[str, float]):
    """``auc``, ``best_hm``, ``best_seen``, ``best_unseen``; and what was visited.

    Attributes:
        biases: (P,) the biases.
        seen: (P,) accuracy on images of seen compositions.
        unseen: (P,) accuracy on images of unseen compositions.
    """

    biases: np.ndarray
    seen: np.ndarray
    unseen: np.ndarray


def bias_sweep(scores: Tensor, truth: Tensor, seen: Tensor, possible: Tensor, mode: Mode = "exact") -> Sweep:
    """Sweep the bias.

    Args:
        scores: (n, K) scores of K compositions; not changed.
        truth: (n,) the true composition.
        seen: (K,), True for compositions that training showed.
        possible: (K,), True for compositions that may be predicted (those of the phase).
        mode: See the module's text.

    Raises:
        DataError: If images of seen or of unseen compositions are missing, or a true composition is ruled out.
    """
    of_seen = seen[truth]
    if not len(truth) or bool(of_seen.all()) or not bool(of_seen.any()):
        raise DataError("a sweep needs images of seen and of unseen compositions.")
    if not bool(possible[truth].all()):
        raise DataError("the true composition of an image is not among the possible ones.")

    margins = _Margins(scores.double(), truth, seen & possible, ~seen & possible)
    biases = margins.changes() if mode == "exact" else margins.reference_biases()
    points = [margins.accuracies(bias, of_seen) for bias in biases]

    sweep = Sweep()
    sweep.biases = np.asarray(biases)
    sweep.seen = np.array([accuracy for accuracy, _ in points])
    sweep.unseen = np.array([accuracy for _, accuracy in points])
    total = sweep.seen + sweep.unseen
    means = np.divide(2 * sweep.seen * sweep.unseen, total, out=np.zeros_like(total), where=total > 0)

    # Area below the curve, by the trapezoidal rule.
    sweep["auc"] = float(abs(np.sum((sweep.seen[1:] + sweep.seen[:-1]) / 2 * np.diff(sweep.unseen))))
    sweep["best_hm"] = float(means.max())
    sweep["best_seen"] = float(sweep.seen.max())
    sweep["best_unseen"] = float(sweep.unseen.max())
    return sweep


class _Margins:
    """What a bias decides: each image's best seen and best unseen composition, and whether they are the true one.

    Args:
        scores: (n, K).
        truth: (n,) the true composition.
        seen: (K,), True for seen compositions that may be predicted.
        unseen: (K,), True for unseen compositions that may be predicted.
    """

    def __init__(self, scores: Tensor, truth: Tensor, seen: Tensor, unseen: Tensor) -> None:
        best_seen, self.best_seen = scores.masked_fill(~seen, -torch.inf).max(1)
        best_unseen, self.best_unseen = scores.masked_fill(~unseen, -torch.inf).max(1)
        self.truth = truth
        self.gap = best_seen - best_unseen  # the bias at which the answer turns from seen to unseen
        self.true_gap = best_seen - scores.gather(1, truth[:, None])[:, 0]
        self.is_unseen = unseen[truth]

    def accuracies(self, bias: float, of_seen: Tensor) -> tuple[float, float]:
        """Return the accuracy on images of seen and of unseen compositions; ``of_seen`` (n,) tells them apart."""
        answer = torch.where(self.gap >= bias, self.best_seen, self.best_unseen)  # ties go to seen ones
        right = (answer == self.truth).double()
        return float(right[of_seen].mean()), float(right[~of_seen].mean())

    def changes(self) -> list[float]:
        """Return minus infinity, a bias between any two neighbouring gaps, and plus infinity."""
        gaps = self.gap[self.gap.isfinite()].unique().numpy()
        return [-np.inf, *((gaps[1:] + gaps[:-1]) / 2), np.inf]

    def reference_biases(self) -> list[float]:
        """Return the reference's list: some twenty of the biases that unseen samples tip over at, and a huge one."""
        right = self.is_unseen & (self.best_unseen == self.truth)
        tips = np.sort(self.true_gap[right].numpy() - _MARGIN)
        step = max(1, len(tips) // _BINS)
        return [*tips[::step], _HUGE]


def open_world_accuracy(scores: Tensor, truth: Tensor) -> float:
    """Return the share of images whose best composition is the true one, among all, also those that never occur.

    Args:
        scores: (n, K) scores of all compositions.
        truth: (n,) the true composition.
    """
    return float((scores.argmax(1) == truth).double().mean())
