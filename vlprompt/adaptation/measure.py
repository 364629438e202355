"""Figures of one method on one stream, before and after adaptation, and over several orders of it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vlprompt.adaptation import ADAPTERS
from vlprompt.adaptation.base import Adapter
from vlprompt.adaptation.mixing import UNKNOWN, intruders_of
from vlprompt.adaptation.plans import worst_tenth
from vlprompt.adaptation.predictions import Predictions
from vlprompt.adaptation.record import AdaptationRecord, Tuning, view_setting
from vlprompt.adaptation.summary import METRICS, ROBUST
from vlprompt.core.options import options_model
from vlprompt.data import ImageDataset
from vlprompt.experiments.cell import CellResult
from vlprompt.metrics.classification import compute
from vlprompt.metrics.outliers import auroc, average_precision, false_positives_at_95, open_set_rate

__all__ = [
    "add_costs",
    "add_robust",
    "add_scores",
    "add_spread",
    "figures",
    "make_record",
    "scores",
]

_DIGITS = 6  # of recorded fractions; one image of 50,000 changes the fifth


def figures(predictions: Predictions, labels: Tensor) -> dict[str, float]:
    """Return what predictions are worth, without refused images.

    Args:
        predictions: Of n images.
        labels: (n,) true classes.

    Returns:
        Every metric after adaptation and, as ``before_<metric>``, without; ``gained``, the share of images that only
        adaptation names rightly, ``lost``, that of the reverse, and ``refused``.
    """
    good = ~predictions.probs.isnan().any(1)
    kept = predictions.rows(good)
    truth = labels[good]

    after = compute(_log(kept.probs), truth, METRICS)
    before = compute(_log(kept.before), truth, METRICS)
    right = kept.classes == truth
    right_before = kept.before.argmax(-1) == truth

    values = {**after, **{f"before_{metric}": value for metric, value in before.items()}}
    values["gained"] = float((right & ~right_before).float().mean())
    values["lost"] = float((~right & right_before).float().mean())
    rounded = {metric: round(value, _DIGITS) for metric, value in values.items()}
    return {**rounded, "refused": float((~good).sum())}


def add_scores(
    result: CellResult,
    label: str,
    adapter: Adapter,
    predictions: Predictions,
    data: ImageDataset,
    name: str,
) -> None:
    """Add a method's figures on a data set of that name, before and after adaptation (see :func:`scores`)."""
    values = scores(predictions, data)
    values["views_kept"] = float(predictions.views_kept.float().mean())
    result.add(values, method=label, start=start_name(adapter), data=name)


def scores(predictions: Predictions, data: ImageDataset) -> dict[str, float]:
    """Return the figures of a stream: :func:`figures` of its known images, and how well intruders are told apart.

    With intruders there are also, for each score that came with the predictions, ``ood_auroc_<score>``,
    ``ood_fpr95_<score>``, ``ood_aupr_<score>`` and ``ood_oscr_<score>`` (see :mod:`vlprompt.metrics.outliers`), each
    also as ``before_``; and ``intruders_accuracy`` if they show known classes.
    """
    strange = intruders_of(data)
    labels = torch.tensor(data.labels)
    values = figures(predictions.rows(~strange), labels[~strange])
    if not bool(strange.any()):
        return values

    good = ~predictions.probs.isnan().any(1)
    known = predictions.rows(good & ~strange)
    others = predictions.rows(good & strange)
    truth = labels[good & ~strange]
    for name, of_known in known.scores.items():
        is_before = name.startswith("before_")
        classes = known.before.argmax(-1) if is_before else known.classes
        told = {
            "auroc": auroc(of_known, others.scores[name]),
            "fpr95": false_positives_at_95(of_known, others.scores[name]),
            "aupr": average_precision(of_known, others.scores[name]),
            "oscr": open_set_rate(of_known, classes == truth, others.scores[name]),
        }
        prefix = "before_" if is_before else ""
        for metric, value in told.items():
            values[f"{prefix}ood_{metric}_{name.removeprefix(prefix)}"] = round(value, _DIGITS)

    theirs = labels[good & strange]
    if bool((theirs != UNKNOWN).all()):
        values["intruders_accuracy"] = round(float((others.classes == theirs).float().mean()), _DIGITS)
        right_before = others.before.argmax(-1) == theirs
        values["before_intruders_accuracy"] = round(float(right_before.float().mean()), _DIGITS)
    return values


def add_costs(result: CellResult, label: str, adapter: Adapter, predictions: Predictions) -> None:
    """Add what a method's figures depend on, and the seconds that it took."""
    result.facts[f"{label}/adapter"] = {
        "method": adapter.method,
        "start": adapter.learner.method,
        "options": plain_options(adapter),
        "optimizer": adapter.optimizer or None,
        "views": predictions.kept.shape[1],
        "granularity": adapter.granularity,
        "updates_first": adapter.updates_first,
        "reset_scope": adapter.reset_scope,
        "horizon": adapter.horizon,
        "batch": adapter.batch,
        "calibrated": adapter.calibrated,
        "state_bytes": state_bytes(adapter),
    }

    names = ("generation", "encoding", "adaptation")
    for name, seconds in zip(names, predictions.seconds.nanmean(0).tolist(), strict=True):
        result.timings[f"{label}/{name}_per_image"] = seconds
    if adapter.backbone.device.type == "cuda":
        result.timings[f"{label}/peak_bytes"] = float(
            torch.cuda.max_memory_allocated(adapter.backbone.device)
        )


def add_robust(
    result: CellResult, label: str, adapter: Adapter, predictions: Predictions, data: ImageDataset, name: str
) -> float:
    """Add a method's accuracy on attacked images and that without adaptation; return the first."""
    values = figures(predictions, torch.tensor(data.labels))
    robust = {ROBUST: values["accuracy"], f"before_{ROBUST}": values["before_accuracy"]}
    result.add(robust, method=label, start=start_name(adapter), data=name)
    return values["accuracy"]


def add_spread(
    result: CellResult, label: str, accuracies: Sequence[float], adapter: Adapter, name: str
) -> None:
    """Add how much a method's accuracy on a data set of that name depends on the order of the stream."""
    values = {
        "accuracy_over_orders": statistics.fmean(accuracies),
        "accuracy_spread": statistics.stdev(accuracies),
        "accuracy_worst_tenth": worst_tenth(accuracies),
    }
    rounded = {metric: round(value, _DIGITS) for metric, value in values.items()}
    result.add({**rounded, "orders": len(accuracies)}, method=label, start=start_name(adapter), data=name)


def make_record(
    label: str,
    adapter: Adapter,
    predictions: Predictions,
    data: ImageDataset,
    stream: Mapping[str, Any],
    tuning: Tuning,
    uses: Sequence[str],
) -> AdaptationRecord:
    """Describe one row (see :class:`AdaptationRecord`)."""
    values = scores(predictions, data)
    refused = int(values.pop("refused"))
    return AdaptationRecord(
        method=label,
        data=data.name,
        backbone=adapter.backbone.fingerprint["id"],
        classnames=data.fingerprint()["classnames_hash"],
        prompts=f"{start_name(adapter)}: {'; '.join(data.templates)}",
        views=view_setting(adapter),
        stream=stream,
        granularity=adapter.granularity,
        batch=adapter.batch,
        updates_first=adapter.updates_first,
        reset_scope=adapter.reset_scope,
        horizon=adapter.horizon,
        calibrated=adapter.calibrated,
        options=plain_options(adapter),
        tuning=tuning,
        uses=list(uses),
        metrics=values,
        refused=refused,
        state_bytes=state_bytes(adapter),
    )


def start_name(adapter: Adapter) -> str:
    """Return what the classifier before adaptation is called: the learner, and its words where they were chosen."""
    words = adapter.options.get("init")
    return adapter.learner.method if words is None else f"{adapter.learner.method}: {words}"


def plain_options(adapter: Adapter) -> dict[str, Any]:
    """Return an adapter's options, defaults included, where JSON can hold them; its seed is that of the cell."""
    fields = options_model(ADAPTERS.get(adapter.method).target).model_fields
    options = {name: field.default for name, field in fields.items()}
    options |= adapter.options
    plain = (str, int, float, bool, list, tuple, type(None))
    return {name: value for name, value in options.items() if name != "seed" and isinstance(value, plain)}


def state_bytes(adapter: Adapter) -> int:
    """Return the size of what an adapter has learned from the stream."""
    return sum(tensor.numel() * tensor.element_size() for tensor in adapter.learned().values())


def _log(probs: Tensor) -> Tensor:
    """Return logarithms; a probability of 0 counts as the smallest float32, about 1e-38."""
    return probs.clamp(min=torch.finfo(torch.float32).tiny).log()
