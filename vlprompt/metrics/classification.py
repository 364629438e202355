"""Metrics as pure functions of logits and labels: fractions in [0, 1], but ``nll`` in nats and ``brier`` in [0, 2].

Logits are any scores whose softmax gives the probabilities, so a method that yields probabilities passes
their logarithm and gets the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vlprompt.core.errors import DataError, NonFiniteError, UnknownNameError
from vlprompt.metrics.multi_label import cf1, mean_average_precision, mean_over_classes, of1

__all__ = [
    "DEFAULT_METRICS",
    "METRICS",
    "MULTI_LABEL_DEFAULTS",
    "MULTI_LABEL_METRICS",
    "accuracy",
    "brier",
    "compute",
    "ece",
    "ece_20",
    "map_11_point",
    "map_11_point_elevater",
    "mean_per_class",
    "nll",
    "roc_auc",
]


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Share of samples whose highest score is the true class (top-1); of equal scores the first counts.

    Args:
        logits: Scores, (n, C).
        labels: True classes, (n,); for multi-label truth, (n, C), any class the sample has is right. Samples without a
            class don't count, nor do those whose highest score is a class of which nobody can say (-1).

    Raises:
        DataError: If no sample counts.
    """
    guess = logits.argmax(1)
    if labels.ndim == 1:
        return float((guess == labels).double().mean())

    truth = labels.gather(1, guess[:, None])[:, 0]
    counts = (truth >= 0) & (labels > 0).any(1)
    if not counts.any():
        raise DataError("accuracy needs at least one sample with a class; every label is 0.")
    return float(truth[counts].double().mean())


def mean_per_class(logits: Tensor, labels: Tensor) -> float:
    """Mean recall over the classes present in ``labels`` (balanced accuracy).

    Args:
        logits: Scores, (n, C).
        labels: True classes, (n,); a class without a sample doesn't count.
    """
    from sklearn.metrics import recall_score  # takes a second, which a prediction would wait for

    truth = labels.numpy()
    guess = logits.argmax(1).numpy()
    return float(recall_score(truth, guess, labels=np.unique(truth), average="macro"))


def nll(logits: Tensor, labels: Tensor) -> float:
    """Mean negative log-likelihood of the true class, in nats.

    Args:
        logits: Scores, (n, C).
        labels: True classes, (n,).
    """
    return float(F.cross_entropy(logits, labels))


def ece(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Expected calibration error: mean |confidence - accuracy| over equal-width bins weighted by size.

    Guo et al., "On calibration of modern neural networks" (ICML 2017), section 2.

    Args:
        logits: Scores, (n, C).
        labels: True classes, (n,).
        bins: Number of bins of the confidence.
    """
    # Importing torchmetrics takes seconds, and only this function needs it.
    from torchmetrics.functional.classification import multiclass_calibration_error

    probs = logits.softmax(1)
    return float(
        multiclass_calibration_error(probs, labels, num_classes=probs.shape[1], n_bins=bins, norm="l1")
    )


def ece_20(logits: Tensor, labels: Tensor) -> float:
    """Return :func:`ece` with 20 bins, as papers on the calibration of test-time adaptation print it."""
    return ece(logits, labels, bins=20)


def brier(logits: Tensor, labels: Tensor) -> float:
    """Mean squared distance of the probabilities from the true class's one-hot row (Brier, 1950), in [0, 2].

    Args:
        logits: Scores, (n, C).
        labels: True classes, (n,).
    """
    truth = F.one_hot(labels, logits.shape[1])
    return float((logits.softmax(1) - truth).square().sum(1).mean())


def roc_auc(logits: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve of a two-class task; the score is p(class 1) (ELEVATER's Hateful Memes).

    Args:
        logits: Scores, (n, 2).
        labels: True classes 0 or 1, (n,).

    Raises:
        DataError: If there are not exactly two classes, or only one of them occurs.
    """
    from sklearn.metrics import roc_auc_score  # takes a second, which a prediction would wait for

    if logits.shape[1] != 2:
        raise DataError(f"roc_auc needs 2 classes, got {logits.shape[1]}. Use accuracy or mean_per_class.")
    if labels.unique().numel() != 2:
        raise DataError("roc_auc needs samples of both classes; the labels hold only one.")
    return float(roc_auc_score(labels.numpy(), logits.softmax(1)[:, 1].numpy()))


def map_11_point(logits: Tensor, labels: Tensor) -> float:
    """Mean over classes of the 11-point average precision (Everingham et al., "The PASCAL VOC Challenge", IJCV 2010).

    Per class, the highest precision at any recall >= t, averaged over t = 0.0, 0.1 ... 1.0. Only ranks matter, and
    samples of equal scores count together, so their order does not matter. Classes without positives are left out.

    Args:
        logits: Scores, (n, C).
        labels: Multi-label truth of zeros and ones, (n, C); or true classes, (n,).

    Raises:
        DataError: If no class has a positive sample.
    """
    return mean_over_classes(_average_precision, logits, labels, "map_11_point")


def map_11_point_elevater(logits: Tensor, labels: Tensor) -> float:
    """Mean over classes of the 11-point average precision as ELEVATER's toolkit computes it (Li et al., NeurIPS 2022).

    It differs from :func:`map_11_point` in two ways. The precision at a recall of 0 is always 1, because the curve
    ends there by convention. And recalls are compared in floating point, where 0.7 may be reached or not.

    Args:
        logits: Scores, (n, C).
        labels: Multi-label truth of zeros and ones, (n, C); or true classes, (n,).

    Raises:
        DataError: If no class has a positive sample.
    """
    return mean_over_classes(_elevater_precision, logits, labels, "map_11_point_elevater")


Metric = Callable[[Tensor, Tensor], float]
METRICS: dict[str, Metric] = {
    "accuracy": accuracy,
    "mean_per_class": mean_per_class,
    "nll": nll,
    "ece": ece,
    "ece_20": ece_20,
    "brier": brier,
    "roc_auc": roc_auc,
    "map": mean_average_precision,
    "cf1": cf1,
    "of1": of1,
    "map_11_point": map_11_point,
    "map_11_point_elevater": map_11_point_elevater,
}
DEFAULT_METRICS = ("accuracy", "mean_per_class", "nll", "ece")
MULTI_LABEL_DEFAULTS = ("accuracy", "map", "map_11_point", "map_11_point_elevater")
MULTI_LABEL_METRICS = (*MULTI_LABEL_DEFAULTS, "cf1", "of1")


def compute(logits: Tensor, labels: Tensor, names: Sequence[str] = DEFAULT_METRICS) -> dict[str, float]:
    """Compute several metrics in float64 on the CPU.

    Args:
        logits: Scores, (n, C), any float type and device.
        labels: True classes, (n,); for a multi-label metric (n, C) of ones, zeros, and -1 where nobody can say.
        names: Keys of :data:`METRICS`.

    Returns:
        One float per name, in the order given.

    Raises:
        UnknownNameError: If a metric doesn't exist.
        DataError: If there is nothing to score, or shapes or labels don't fit.
        NonFiniteError: If a score is NaN or plus infinity.
    """
    for name in names:
        if name not in METRICS:
            raise UnknownNameError("metric", name, METRICS)

    scores = torch.as_tensor(logits).detach().cpu().double()
    truth = torch.as_tensor(labels).detach().cpu().long()
    _check(scores, truth)

    if truth.ndim == 2 and (single := [n for n in names if n not in MULTI_LABEL_METRICS]):
        raise DataError(f"{', '.join(single)} need one label per sample; these labels are multi-label.")
    return {name: METRICS[name](scores, truth) for name in names}


def _average_precision(scores: Tensor, truth: Tensor) -> float:
    """Return the 11-point average precision of one class with at least one positive, (n,) and (n,)."""
    order = scores.argsort(descending=True)
    hits = truth[order].cumsum(0).double()
    precision = hits / torch.arange(1, len(hits) + 1)

    # A threshold takes all samples of a score or none, so only the last of equal scores is a point of the curve.
    last = torch.ones(len(order), dtype=torch.bool)
    last[:-1] = scores[order][1:] != scores[order][:-1]
    hits = hits[last]
    precision = precision[last]

    # Whole numbers of positives, because 7 * 0.1 > 0.7 in floating point.
    needed = [math.ceil(tenths * int(hits[-1]) / 10) for tenths in range(11)]
    return float(np.mean([float(precision[hits >= count].max()) for count in needed]))


def _elevater_precision(scores: Tensor, truth: Tensor) -> float:
    """Return ELEVATER's 11-point average precision of one class with at least one positive, (n,) and (n,)."""
    from sklearn.metrics import precision_recall_curve  # takes a second, which a prediction would wait for

    precision, recall, _ = precision_recall_curve(truth.numpy(), scores.numpy())
    return float(np.mean([precision[recall >= level].max() for level in np.linspace(1, 0, 11)]))


def _check(scores: Tensor, truth: Tensor) -> None:
    if scores.ndim != 2 or truth.ndim not in (1, 2) or len(scores) != len(truth):
        raise DataError(
            f"logits must be (n, C) and labels (n,), got {tuple(scores.shape)} and {tuple(truth.shape)}."
        )
    if len(scores) == 0:
        raise DataError("no samples to score.")
    if truth.ndim == 2 and truth.shape != scores.shape:
        raise DataError(f"multi-label truth must be {tuple(scores.shape)}, got {tuple(truth.shape)}.")
    if truth.ndim == 1 and not 0 <= int(truth.min()) <= int(truth.max()) < scores.shape[1]:
        raise DataError(
            f"labels run from {truth.min()} to {truth.max()}, but there are {scores.shape[1]} classes."
        )
    # Minus infinity is the logarithm of a probability of 0 and welcome.
    if bad := int((scores.isnan() | scores.isposinf()).any(1).sum()):
        raise NonFiniteError(f"the logits of {bad} of {len(scores)} samples are NaN or infinite.")
