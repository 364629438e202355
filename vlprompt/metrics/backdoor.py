"""How well a scanner tells poisoned images from clean ones, and whether it names their triggers and objects."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from vlprompt.core.errors import DataError, NonFiniteError
from vlprompt.metrics.composition import bias_sweep, open_world_accuracy
from vlprompt.metrics.verdicts import Verdicts

__all__ = [
    "COMPOSITION_FIGURES",
    "OBJECT_FIGURES",
    "SCORE_FIGURES",
    "ComposedData",
    "false_alarms_at",
    "scan_metrics",
    "verdict_metrics",
]

SCORE_FIGURES = (
    *("fpr", "auroc", "auroc/seen", "auroc/unseen", "tpr", "tpr/seen", "tpr/unseen"),
    *("fpr_at_95_tpr", "fpr_at_95_tpr/seen", "fpr_at_95_tpr/unseen"),
)
"""The figures of :func:`verdict_metrics` of every scanner, where seen and unseen compositions occur."""

OBJECT_FIGURES = ("object_accuracy_clean", "object_accuracy_triggered")
"""Those that a scanner has which names objects, in addition."""

COMPOSITION_FIGURES = ("trigger_accuracy", "auc", "best_hm")
"""Those that a scanner has which names triggers and scores compositions, in addition."""


class ComposedData(Protocol):
    """A data set that knows the trigger and the true object of every image."""

    @property
    def split(self) -> str:
        """Which phase it belongs to."""

    @property
    def triggers(self) -> tuple[str, ...]:
        """T names, the first ``"clean"``."""

    @property
    def compositions(self) -> Any:
        """Which compositions occur: ``seen`` (T, C) and ``allowed(split)`` (T, C), both True where one may occur."""

    @property
    def targets(self) -> dict[str, list[int]]:
        """For n images their ``"trigger"`` and their ``"label"``, which is the true object."""


def verdict_metrics(verdicts: Verdicts, data: ComposedData, threshold: float) -> dict[str, float]:
    """Return all figures of a scanner on a data set of compositions.

    Args:
        verdicts: On every image, in the data set's order.
        data: The true triggers and objects. Labels are never the ones that an attacker wrote.
        threshold: The score from which an image is called poisoned.

    Returns:
        ``auroc``, ``tpr``, ``fpr`` and ``fpr_at_95_tpr`` of all triggered images against all clean ones, then with
        ``/seen`` and ``/unseen`` of those whose composition training showed or didn't show; ``auroc/<trigger>``.
        If the scanner names triggers and objects also ``trigger_accuracy``, ``object_accuracy_clean``,
        ``object_accuracy_triggered`` and ``object_accuracy/<trigger>``. If it scores compositions also
        ``composition_accuracy_open`` and those of the bias sweep: ``auc``, ``best_hm``, ``best_seen``,
        ``best_unseen``, and with ``parity_`` in front as the reference measures them.
    """
    targets = {name: torch.tensor(values) for name, values in data.targets.items()}
    trigger = targets["trigger"]
    label = targets["label"]
    is_seen = torch.as_tensor(data.compositions.seen)[trigger, label]

    figures = scan_metrics(verdicts.score, trigger, is_seen, threshold, data.triggers)
    if verdicts.trigger is not None:
        right = verdicts.trigger.argmax(1) == trigger
        figures |= _trigger_accuracy(right, trigger > 0, is_seen)
    if verdicts.object is not None:
        right = verdicts.object.argmax(1) == label
        figures |= _object_accuracy(right, trigger, data.triggers)
    if verdicts.composition is not None:
        figures |= _composition_figures(verdicts.composition, targets, data)
    return figures


def scan_metrics(
    score: Tensor, trigger: Tensor, seen: Tensor, threshold: float, names: Sequence[str] = ()
) -> dict[str, float]:
    """Return how well scores tell triggered images from clean ones (see :func:`verdict_metrics`).

    Args:
        score: (n,), larger is more suspicious.
        trigger: (n,), 0 for clean.
        seen: (n,), whether training showed the image's composition.
        threshold: The score from which an image is called poisoned.
        names: T names of triggers, for one AUROC each; empty for none.

    Raises:
        DataError: If there is no clean or no triggered image.
        NonFiniteError: If a score is not a number.
    """
    clean = trigger == 0
    poisoned = trigger > 0
    if not bool(clean.any()) or not bool(poisoned.any()):
        raise DataError("figures of a scanner need clean and triggered images.")
    if not bool(score.isfinite().all()):
        raise NonFiniteError(
            f"{int((~score.isfinite()).sum())} of {len(score)} scores of the scanner are no numbers."
        )

    figures = {"fpr": float((score[clean] >= threshold).double().mean())}
    for suffix, rows in (("", poisoned), ("/seen", poisoned & seen), ("/unseen", poisoned & ~seen)):
        if bool(rows.any()):
            figures[f"auroc{suffix}"] = _auroc(score[clean], score[rows])
            figures[f"tpr{suffix}"] = float((score[rows] >= threshold).double().mean())
            figures[f"fpr_at_95_tpr{suffix}"] = false_alarms_at(score[clean], score[rows])

    for number, name in enumerate(names):
        rows = trigger == number
        if number and bool(rows.any()):
            figures[f"auroc/{name}"] = _auroc(score[clean], score[rows])
    return figures


def false_alarms_at(clean: Tensor, poisoned: Tensor, rate: float = 0.95) -> float:
    """Return the share of clean images that are suspected where enough poisoned ones are.

    Args:
        clean: (n,) scores of clean images.
        poisoned: (m,) scores of poisoned images.
        rate: Share of the poisoned images that must be suspected, in (0, 1]. The threshold is the largest one that
            does this.
    """
    ordered = poisoned.double().sort(descending=True).values
    threshold = ordered[math.ceil(rate * len(ordered)) - 1]
    return float((clean.double() >= threshold).double().mean())


def _auroc(clean: Tensor, poisoned: Tensor) -> float:
    from sklearn.metrics import roc_auc_score  # takes a second, which a prediction would wait for

    truth = np.r_[np.zeros(len(clean)), np.ones(len(poisoned))]
    return float(roc_auc_score(truth, torch.cat([clean, poisoned]).double().numpy()))


def _trigger_accuracy(right: Tensor, poisoned: Tensor, seen: Tensor) -> dict[str, float]:
    """Return the share of triggered images whose trigger is named right, also for seen and unseen compositions."""
    figures = {}
    for suffix, rows in (("", poisoned), ("/seen", poisoned & seen), ("/unseen", poisoned & ~seen)):
        if bool(rows.any()):
            figures[f"trigger_accuracy{suffix}"] = float(right[rows].double().mean())
    return figures


def _object_accuracy(right: Tensor, trigger: Tensor, names: Sequence[str]) -> dict[str, float]:
    """Return the share of images whose object is named right: clean, triggered, and for each trigger."""
    figures = {}
    for name, rows in (("clean", trigger == 0), ("triggered", trigger > 0)):
        if bool(rows.any()):
            figures[f"object_accuracy_{name}"] = float(right[rows].double().mean())
    for number, name in enumerate(names):
        rows = trigger == number
        if bool(rows.any()):
            figures[f"object_accuracy/{name}"] = float(right[rows].double().mean())
    return figures


def _composition_figures(
    scores: Tensor, targets: Mapping[str, Tensor], data: ComposedData
) -> dict[str, float]:
    """Return accuracies over compositions: of all, and over a bias between seen and unseen ones.

    Args:
        scores: (n, T, C).
        targets: ``"trigger"`` and ``"label"``, (n,) each.
        data: Says which compositions occur.
    """
    flat = scores.flatten(1)
    truth = targets["trigger"] * scores.shape[2] + targets["label"]
    figures = {"composition_accuracy_open": open_world_accuracy(flat, truth)}

    seen = torch.as_tensor(data.compositions.seen).flatten()
    possible = torch.as_tensor(data.compositions.allowed(data.split)).flatten()
    # A sweep needs images of both kinds.
    if bool(seen[truth].all()) or not bool(seen[truth].any()):
        return figures
    figures |= bias_sweep(flat, truth, seen, possible)
    parity = bias_sweep(flat, truth, seen, possible, "parity")
    return figures | {f"parity_{name}": value for name, value in parity.items()}
