"""What a scanner chooses on validation data: how three kinds of logits are mixed, and where suspicion begins."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["best_mixing", "threshold_at"]

_GRID = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)


def best_mixing(
    logits: Mapping[str, Tensor], targets: Mapping[str, Tensor], seen: Tensor
) -> tuple[float, float, float]:
    """Choose the weights of trigger and object logits beside those of compositions.

    Args:
        logits: ``composition`` (n, T, C), ``trigger`` (n, T), ``object`` (n, C).
        targets: ``trigger`` (n,) and ``label`` (n,).
        seen: (T, C), compositions that training showed.

    Returns:
        The two weights, and the harmonic mean of the accuracies on images of seen and of unseen compositions that they
        reach (plain accuracy if there is no unseen one); of equally good weights the smallest.
    """
    classes = seen.shape[1]
    truth = targets["trigger"] * classes + targets["label"]
    is_seen = seen.flatten()[truth]

    best = (1.0, 1.0, -1.0)
    for a, b in itertools.product(_GRID, _GRID):
        mixed = logits["composition"] + a * logits["trigger"][..., None] + b * logits["object"][:, None]
        right = (mixed.flatten(1).argmax(1) == truth).double()
        if bool(is_seen.all()) or not bool(is_seen.any()):
            score = float(right.mean())
        else:
            of_seen = float(right[is_seen].mean())
            of_unseen = float(right[~is_seen].mean())
            score = 2 * of_seen * of_unseen / (of_seen + of_unseen) if of_seen + of_unseen else 0.0
        if score > best[2]:
            best = (a, b, score)
    return best


def threshold_at(clean: Tensor, false_alarms: float) -> float:
    """Return the smallest threshold that at most a share of (n,) clean images' scores reach.

    With no clean image it is 0.5. A score that equals the threshold counts as reaching it.
    """
    if not len(clean):
        return 0.5
    ordered = clean.double().sort(descending=True).values
    allowed = math.floor(false_alarms * len(ordered))
    # Just above the first score that may not be reached any more.
    return float(torch.nextafter(ordered[allowed].float(), torch.tensor(math.inf)))
