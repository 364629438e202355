"""How well poisoned images are found, what is found in them, and whether the object is still seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from vlprompt.core.errors import DataError
from vlprompt.learners._judgement import Judgement
from vlprompt.metrics.composition import bias_sweep, open_world_accuracy

__all__ = ["detection_metrics", "false_alarms_at", "judgement_metrics"]


def judgement_metrics(judgement: Judgement, data: Any, threshold: float) -> dict[str, float]:
    """Return all figures of a detector on a data set of pairs.

    Args:
        judgement: Of every image, in the data set's order.
        data: A data set with ``triggers``, ``compositions`` and targets ``"trigger"`` and ``"label"``; the label is the
            true object, never the one an attacker wrote.
        threshold: Score from which an image is called poisoned.

    Returns:
        ``auroc``, ``tpr``, ``fpr``, ``fpr_at_95_tpr`` over all, ``/seen`` and ``/unseen`` against all clean images;
        ``auroc/<trigger>``; if the detector names them ``trigger_accuracy``, ``object_accuracy_clean``,
        ``_triggered`` and ``/<trigger>``; if it scores pairs ``pair_accuracy_open``, and of the bias sweep ``auc``,
        ``best_hm``, ``best_seen``, ``best_unseen``, and the same as the reference takes them, ``parity_...``.
    """
    targets = {name: torch.tensor(values) for name, values in data.targets.items()}
    trigger = targets["trigger"]
    label = targets["label"]
    seen = torch.as_tensor(data.compositions.seen)
    own_seen = seen[trigger, label]
    figures = detection_metrics(judgement.score, trigger, own_seen, threshold, data.triggers)

    if judgement.trigger is not None:
        figures |= _split("trigger_accuracy", judgement.trigger.argmax(1) == trigger, trigger > 0, own_seen)

    if judgement.object is not None:
        right = judgement.object.argmax(1) == label
        for name, chosen in (("clean", trigger == 0), ("triggered", trigger > 0)):
            if bool(chosen.any()):
                figures[f"object_accuracy_{name}"] = float(right[chosen].double().mean())
        for number, name in enumerate(data.triggers):
            if bool((trigger == number).any()):
                figures[f"object_accuracy/{name}"] = float(right[trigger == number].double().mean())

    if judgement.pairs is not None:
        figures |= _pair_figures(judgement.pairs, targets, data)
    return figures


def _pair_figures(pairs: Tensor, targets: Mapping[str, Tensor], data: Any) -> dict[str, float]:
    flat = pairs.flatten(1)
    truth = targets["trigger"] * pairs.shape[2] + targets["label"]
    figures = {"pair_accuracy_open": open_world_accuracy(flat, truth)}
    seen = torch.as_tensor(data.compositions.seen).flatten()
    possible = torch.as_tensor(data.compositions.allowed(data.split)).flatten()

    if bool(seen[truth].all()) or not bool(seen[truth].any()):
        return figures

    figures |= bias_sweep(flat, truth, seen, possible)
    return figures | {f"parity_{k}": v for k, v in bias_sweep(flat, truth, seen, possible, "parity").items()}


def detection_metrics(
    score: Tensor, trigger: Tensor, seen: Tensor, threshold: float, names: Sequence[str] = ()
) -> dict[str, float]:
    """Return detection figures (see :func:`judgement_metrics`).

    Args:
        score: (n,), larger is more suspicious.
        trigger: (n,), 0 for clean.
        seen: (n,), whether the image's pair was in training.
        threshold: From which score an image is called poisoned.
        names: Of triggers, for one AUROC each.

    Raises:
        DataError: If there is no clean or no triggered image.
    """
    clean = trigger == 0
    poisoned = trigger > 0
    if not bool(clean.any()) or not bool(poisoned.any()):
        raise DataError("detection needs clean and triggered images to measure.")

    figures = {"fpr": float((score[clean] >= threshold).double().mean())}

    for suffix, chosen in (("", poisoned), ("/seen", poisoned & seen), ("/unseen", poisoned & ~seen)):
        if bool(chosen.any()):
            figures[f"auroc{suffix}"] = _auroc(score[clean], score[chosen])
            figures[f"tpr{suffix}"] = float((score[chosen] >= threshold).double().mean())
            figures[f"fpr_at_95_tpr{suffix}"] = false_alarms_at(score[clean], score[chosen])

    for number, name in enumerate(names):
        if number and bool((trigger == number).any()):
            figures[f"auroc/{name}"] = _auroc(score[clean], score[trigger == number])

    return figures


def false_alarms_at(clean: Tensor, poisoned: Tensor, rate: float = 0.95) -> float:
    """Return the share of clean scores at or above the largest threshold that ``rate`` of the poisoned reach."""
    ordered = poisoned.double().sort(descending=True).values
    threshold = ordered[int(np.ceil(rate * len(ordered))) - 1]
    return float((clean.double() >= threshold).double().mean())


def _auroc(clean: Tensor, poisoned: Tensor) -> float:
    truth = np.r_[np.zeros(len(clean)), np.ones(len(poisoned))]
    return float(roc_auc_score(truth, torch.cat([clean, poisoned]).double().numpy()))


def _split(name: str, right: Tensor, poisoned: Tensor, seen: Tensor) -> dict[str, float]:
    """Return the share of triggered images whose trigger is named right, split by seen and unseen pairs."""
    parts = {"": poisoned, "/seen": poisoned & seen, "/unseen": poisoned & ~seen}
    return {f"{name}{s}": float(right[rows].double().mean()) for s, rows in parts.items() if bool(rows.any())}
