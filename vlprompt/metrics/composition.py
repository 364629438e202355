"""Seen against unseen pairs: accuracy over a bias on unseen ones, as compositional zero-shot learning measures it.

A bias is added to the scores of unseen pairs; at minus infinity only seen pairs are predicted, at plus infinity only
unseen ones. Between lies a curve of (accuracy on unseen, accuracy on seen). ``exact`` visits every bias at which any
image's answer changes; ``parity`` visits the biases of the reference code, so that numbers compare.

Reference for parity: Forest-art/DFSP test.py (accuracies per sample, some twenty biases, no point at minus infinity).
Differs from it: the caller's scores stay as they are, nothing fails where no unseen sample is right, and pairs that
don't occur are ruled out by minus infinity.
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
        seen: (P,) accuracy on images of seen pairs.
        unseen: (P,) accuracy on images of unseen pairs.
    """

    biases: np.ndarray
    seen: np.ndarray
    unseen: np.ndarray


def bias_sweep(scores: Tensor, truth: Tensor, seen: Tensor, possible: Tensor, mode: Mode = "exact") -> Sweep:
    """Sweep the bias.

    Args:
        scores: (n, P) scores of pairs; not changed.
        truth: (n,) the true pair.
        seen: (P,), True for pairs that training showed.
        possible: (P,), True for pairs that may be predicted (those of the phase).
        mode: See the module's text.

    Raises:
        DataError: If images of seen or of unseen pairs are missing, or a true pair is ruled out.
    """
    own_seen = seen[truth]
    if not len(truth) or bool(own_seen.all()) or not bool(own_seen.any()):
        raise DataError("a sweep needs images of seen and of unseen pairs.")
    if not bool(possible[truth].all()):
        raise DataError("an image's true pair is not among the possible ones.")

    margins = _Margins(scores.double(), truth, seen & possible, ~seen & possible)
    biases = margins.changes() if mode == "exact" else margins.reference_biases()
    sweep = Sweep()
    measured = [margins.accuracies(b, own_seen) for b in biases]
    sweep.biases = np.asarray(biases)
    sweep.seen, sweep.unseen = (np.array([pair[i] for pair in measured]) for i in (0, 1))
    total = sweep.seen + sweep.unseen
    means = np.divide(2 * sweep.seen * sweep.unseen, total, out=np.zeros_like(total), where=total > 0)
    sweep["auc"] = float(abs(np.sum((sweep.seen[1:] + sweep.seen[:-1]) / 2 * np.diff(sweep.unseen))))
    sweep["best_hm"] = float(means.max())
    sweep["best_seen"] = float(sweep.seen.max())
    sweep["best_unseen"] = float(sweep.unseen.max())

    return sweep


class _Margins:
    """What a bias decides: per image its best seen and its best unseen pair, and whether they are the true one."""

    def __init__(self, scores: Tensor, truth: Tensor, seen: Tensor, unseen: Tensor) -> None:
        best_seen, self.seen_pair = scores.masked_fill(~seen, -torch.inf).max(1)
        best_unseen, self.unseen_pair = scores.masked_fill(~unseen, -torch.inf).max(1)
        self.truth = truth
        self.gap = best_seen - best_unseen  # the bias at which the answer turns from seen to unseen
        self.true_gap = best_seen - scores.gather(1, truth[:, None])[:, 0]
        self.is_unseen = unseen[truth]

    def accuracies(self, bias: float, own_seen: Tensor) -> tuple[float, float]:
        answer = torch.where(self.gap >= bias, self.seen_pair, self.unseen_pair)  # ties go to seen pairs
        right = (answer == self.truth).double()
        return float(right[own_seen].mean()), float(right[~own_seen].mean())

    def changes(self) -> list[float]:
        """Return minus infinity, a bias between any two neighbouring gaps, and plus infinity."""
        gaps = self.gap[self.gap.isfinite()].unique().numpy()
        return [-np.inf, *((gaps[1:] + gaps[:-1]) / 2), np.inf]

    def reference_biases(self) -> list[float]:
        """Return the reference's list: some twenty of the biases that unseen samples tip over at, and a huge one."""
        right = self.is_unseen & (self.unseen_pair == self.truth)
        tips = np.sort(self.true_gap[right].numpy() - _MARGIN)
        return [*tips[:: max(1, len(tips) // _BINS)], _HUGE]


def open_world_accuracy(scores: Tensor, truth: Tensor) -> float:
    """Return the share of (n, P) scores whose best of all pairs, also those that never occur, is the true one."""
    return float((scores.argmax(1) == truth).double().mean())
