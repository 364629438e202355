"""Metrics of images with several labels, as pure functions of logits and truth; fractions in [0, 1].

Truth is 1 where an image shows a class, 0 where it does not, and -1 where nobody can say (objects marked difficult),
which no metric counts. A class is predicted where ``sigmoid(logit)`` is above a threshold.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vlprompt.core.errors import DataError

__all__ = ["average_precision", "best_cut", "cf1", "mean_average_precision", "mean_over_classes", "of1"]


def average_precision(scores: Tensor, truth: Tensor) -> float:
    """Return the area below the precision-recall curve of one class, over all its points.

    The sum over thresholds of (recall - recall before) times precision (Everingham et al., the development kit of
    PASCAL VOC 2010, section 3.4.1, without making precision monotone). Equal scores pass a threshold together.

    Args:
        scores: (n,), the higher the surer.
        truth: (n,) of zeros and ones, at least one of which is one.
    """
    order = scores.argsort(descending=True)
    hits = truth[order].cumsum(0).double()
    precision = hits / torch.arange(1, len(hits) + 1)

    # A threshold takes all samples of a score or none, so only the last of equal scores is a point of the curve.
    last = torch.ones(len(order), dtype=torch.bool)
    last[:-1] = scores[order][1:] != scores[order][:-1]
    recall = hits[last] / hits[-1]
    steps = torch.diff(recall, prepend=recall.new_zeros(1))
    return float((steps * precision[last]).sum())


def mean_average_precision(logits: Tensor, labels: Tensor) -> float:
    """Return the mean of :func:`average_precision` over the classes that some image shows.

    Args:
        logits: Scores, (n, C); only their ranks matter.
        labels: Truth, (n, C); or true classes, (n,).

    Raises:
        DataError: If no class has a positive sample.
    """
    return mean_over_classes(average_precision, logits, labels, "map")


def mean_over_classes(
    score: Callable[[Tensor, Tensor], float], logits: Tensor, labels: Tensor, name: str
) -> float:
    """Return the mean of a score over the classes with at least one positive; unknown truth is left out of each.

    Args:
        score: Of (n,) scores and (n,) truth of one class.
        logits: (n, C).
        labels: Truth, (n, C); or true classes, (n,).
        name: Of the metric, for the error.

    Raises:
        DataError: If no class has a positive sample.
    """
    truth = labels if labels.ndim == 2 else F.one_hot(labels, logits.shape[1])
    scores = []
    for c in range(truth.shape[1]):
        known = truth[:, c] >= 0
        if (truth[:, c] > 0).any():
            scores.append(score(logits[known, c], truth[known, c]))

    if not scores:
        raise DataError(f"{name} needs at least one positive label; every label is 0.")
    return float(np.mean(scores))


def cf1(logits: Tensor, labels: Tensor, threshold: float = 0.5) -> float:
    """Return the harmonic mean of the precision and the recall that are averaged over classes.

    Classes that no image shows are left out; one that is never predicted has a precision of 0.

    Args:
        logits: (n, C).
        labels: Truth, (n, C); or true classes, (n,).
        threshold: Probability above which a class is predicted, in (0, 1).
    """
    right, predicted, present = _counts(logits, labels, _cut_of(threshold))
    shown = present > 0
    precision = (right / predicted.clamp(min=1))[shown].mean()
    recall = (right / present.clamp(min=1))[shown].mean()
    return _harmonic_mean(float(precision), float(recall)) if bool(shown.any()) else 0.0


def of1(logits: Tensor, labels: Tensor, threshold: float = 0.5) -> float:
    """Return the harmonic mean of precision and recall over all pairs of an image and a class; see :func:`cf1`."""
    right, predicted, present = _counts(logits, labels, _cut_of(threshold))
    total = float(predicted.sum() + present.sum())
    return 2 * float(right.sum()) / total if total else 0.0


def best_cut(logits: Tensor, labels: Tensor) -> float:
    """Return the threshold in (0, 1) at which :func:`of1` is highest, of equally good ones the highest.

    Args:
        logits: (n, C) of validation data.
        labels: Truth, (n, C); or true classes, (n,).
    """
    truth = labels if labels.ndim == 2 else F.one_hot(labels, logits.shape[1])
    known = truth >= 0
    scores, order = logits[known].double().sort(descending=True)
    hits = truth[known][order].cumsum(0).double()
    score = 2 * hits / (torch.arange(1, len(hits) + 1) + hits[-1])

    # Taking one of several equal scores is no threshold.
    score[:-1][scores[1:] == scores[:-1]] = -1
    best = int(score.argmax())
    below = scores[best + 1] if best + 1 < len(scores) else scores[best] - 1
    return float(torch.sigmoid((scores[best] + below) / 2))


def _cut_of(threshold: float) -> float:
    """Return the logit of a probability."""
    if not 0 < threshold < 1:
        raise DataError(f"a threshold is a probability between 0 and 1, got {threshold}.")
    return math.log(threshold / (1 - threshold))


def _counts(logits: Tensor, labels: Tensor, cut: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return of every class how often it is predicted rightly, predicted, and shown: three of (C,)."""
    truth = labels if labels.ndim == 2 else F.one_hot(labels, logits.shape[1])
    predicted = (logits > cut) & (truth >= 0)
    right = predicted & (truth > 0)
    return right.sum(0).double(), predicted.sum(0).double(), (truth > 0).sum(0).double()


def _harmonic_mean(a: float, b: float) -> float:
    return 2 * a * b / (a + b) if a + b else 0.0
