"""What a scanner chooses on validation data: how three kinds of logits are mixed, and where suspicion begins."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlprompt.core.errors import NonFiniteError

__all__ = ["MixingTask", "best_mixing", "threshold_at"]

_GRID = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True)
class MixingTask:
    """One task's validation images.

    Attributes:
        logits: ``composition`` (n, T, C), ``trigger`` (n, T), ``object`` (n, C).
        targets: ``trigger`` (n,) and ``label`` (n,).
        seen: (T, C), compositions that training showed.
    """

    logits: Mapping[str, Tensor]
    targets: Mapping[str, Tensor]
    seen: Tensor

    def score(self, a: float, b: float) -> float:
        """Return the harmonic mean of the accuracies on images of seen and of unseen compositions.

        It is plain accuracy if all compositions are seen, or none.

        Args:
            a: Weight of the trigger logits beside those of compositions.
            b: Weight of the object logits.
        """
        compositions = self.logits["composition"]
        mixed = compositions + a * self.logits["trigger"][..., None] + b * self.logits["object"][:, None]

        truth = self.targets["trigger"] * self.seen.shape[1] + self.targets["label"]
        correct = (mixed.flatten(1).argmax(1) == truth).double()

        is_seen = self.seen.flatten()[truth]
        if bool(is_seen.all()) or not bool(is_seen.any()):
            return float(correct.mean())

        first = float(correct[is_seen].mean())
        second = float(correct[~is_seen].mean())
        return 2 * first * second / (first + second) if first + second else 0.0


def best_mixing(tasks: Sequence[MixingTask]) -> tuple[float, float, float]:
    """Choose the weights of trigger and object logits beside those of compositions.

    Args:
        tasks: Validation images of each task.

    Returns:
        The two weights and the mean over tasks of the score that they reach; of equally good weights the smallest.
    """
    best = (1.0, 1.0, -1.0)
    for a, b in itertools.product(_GRID, _GRID):
        score = sum(task.score(a, b) for task in tasks) / len(tasks)
        if score > best[2]:
            best = (a, b, score)
    return best


def threshold_at(clean: Tensor, false_alarms: float) -> float:
    """Return the smallest threshold that at most a share of (n,) clean images' scores reach.

    With no clean image it is 0.5. A score that equals the threshold counts as reaching it.

    Raises:
        NonFiniteError: If a score is not a number.
    """
    if not len(clean):
        return 0.5
    if not bool(clean.isfinite().all()):
        raise NonFiniteError("scores of clean validation images are no numbers, so they give no threshold.")

    ordered = clean.double().sort(descending=True).values
    allowed = math.floor(false_alarms * len(ordered))
    # Just above the first score that may not be reached any more.
    return float(torch.nextafter(ordered[allowed].float(), torch.tensor(math.inf)))
