"""What a run says at its end: the flat figures of ``metrics.json`` and the page that shows them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from vlprompt.backbones import Backbone
from vlprompt.classification.config import RunConfig
from vlprompt.classification.evaluate import predict_logits
from vlprompt.classification.fit import RunResult
from vlprompt.classification.protocols import ProtocolResult
from vlprompt.classification.transfer_matrix import TransferMatrix
from vlprompt.data import FeatureCache, ImageDataset
from vlprompt.experiments.folder import environment, failures, yaml_text
from vlprompt.experiments.report import RunRecord
from vlprompt.learners import Learner

__all__ = ["Shown", "metrics", "record", "show"]

# A learner, what it was tested on, and how it was trained: what the page shows images of.
Shown = tuple[Learner, ImageDataset, RunResult]


def metrics(
    config: RunConfig, backbone: Backbone, result: ProtocolResult, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the flat content of metrics.json: figures first, then what they were measured under."""
    return {
        **result.metrics,
        "protocol": result.protocol,
        "learner": config.learner_name,
        "data": config.meta.pairs if config.protocol.name == "meta" else config.data.name,
        **({"targets": config.protocol.targets} if config.protocol.targets else {}),
        "shots": config.protocol.shots,
        "seeds": config.protocol.seeds,
        "backbone": backbone.name,
        "backbone_fingerprint": backbone.fingerprint,
        **facts,
        **environment(),
    }


def record(
    config: RunConfig,
    backbone: Backbone,
    result: ProtocolResult,
    found: Mapping[str, Any],
    command: str,
    matrix: TransferMatrix | None,
) -> RunRecord:
    """Return what the page says in figures and lines.

    Args:
        config: Of the run.
        backbone: Of the run.
        result: Of its protocol.
        found: See :func:`metrics`.
        command: Which started it.
        matrix: Of a transfer study.
    """
    numbers = {
        k: float(v) for k, v in found.items() if isinstance(v, (int, float)) and not isinstance(v, bool)
    }
    base = "base/" if "base/accuracy" in numbers else ""
    headline = {
        "zero-shot": numbers.get(f"{base}zero_shot_accuracy"),
        "from scratch": numbers.get(f"scratch/{base}accuracy"),
        "learned": numbers.get(f"{base}accuracy"),
    }
    page = RunRecord(
        title=f"{config.learner_name} on {_subject(config)}",
        headline={k: v for k, v in headline.items() if v is not None},
        summary=f"{backbone.name}, {result.protocol}, {_describe(config)}.",
        metrics=numbers,
        curves=_curves(config, numbers),
        failures=failures(result),
        config=yaml_text(config),
        command=command,
        environment={**environment(), "backbone": backbone.fingerprint["id"]},
    )
    if matrix is not None:
        explanation = (
            "Accuracy of the column's task, tuned from the row's prompts, against tuned from scratch."
        )
        page.drawings = {"What helps what": (explanation, matrix.figure())}
    return page


def show(page: RunRecord, shown: Shown, cache: FeatureCache) -> None:
    """Put a trained learner's history, predictions and images on the page."""
    learner, test, trained = shown
    logits, labels = predict_logits(learner, test, cache=cache)
    page.history = trained.history
    page.classnames, page.labels = list(test.classnames), np.asarray(labels)
    page.probs, page.image = logits.softmax(-1).numpy(), lambda i: test[i][0]


def _subject(config: RunConfig) -> str:
    return config.meta.pairs if config.protocol.name == "meta" else ", ".join(config.data.names)


def _curves(
    config: RunConfig, numbers: Mapping[str, float]
) -> dict[str, list[tuple[int, float, float | None]]]:
    shots = config.target.shots or config.protocol.shots
    if config.protocol.name not in ("coop-fewshot", "multitask") or len(shots) < 2:
        return {}
    lines = {
        config.learner_name: "shots{}/accuracy",
        "from scratch": "scratch/shots{}/accuracy",
        "zero-shot": "shots{}/zero_shot_accuracy",
    }
    curves = {
        label: [
            (k, numbers[key.format(k)], numbers.get(f"{key.format(k)}_ci95"))
            for k in shots
            if key.format(k) in numbers
        ]
        for label, key in lines.items()
    }
    return {label: points for label, points in curves.items() if points}


def _describe(config: RunConfig) -> str:
    shots = "/".join(map(str, config.protocol.shots))
    seeds = len(config.protocol.seeds)
    return f"{shots} shots per class, {seeds} seed{'s' if seeds > 1 else ''}"
