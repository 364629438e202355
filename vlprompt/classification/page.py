"""What the report of classification shows beside tables: headline figures, curves, predictions, images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlprompt.classification.config import ClassificationConfig, Study
from vlprompt.classification.distil import TRANSDUCTIVE
from vlprompt.classification.evaluate import predict_logits
from vlprompt.classification.label_space import fitting
from vlprompt.classification.protocols import protocol_of
from vlprompt.classification.protocols.transfer import matrix_of
from vlprompt.core.files import read_jsonl
from vlprompt.core.template_files import read_templates
from vlprompt.data import FeatureCache, ImageDataset
from vlprompt.experiments.cell import Cell
from vlprompt.experiments.report import RunRecord
from vlprompt.experiments.results import Results
from vlprompt.learners import Learner

__all__ = [
    "TEMPLATES",
    "add_curves",
    "add_history",
    "add_predictions",
    "add_templates",
    "describe",
    "study_facts",
]

TEMPLATES = "templates.txt"
"""The file of a cell that holds the templates that its learner found."""


def study_facts(config: ClassificationConfig) -> dict[str, Any]:
    """Return what the figures of a study were measured under."""
    protocol = config.protocol
    facts: dict[str, Any] = {
        "protocol": _protocol(config),
        "learner": config.learner_name,
        "data": config.meta.pairs if protocol.name == "meta" else config.data.name,
        "split": config.data.split,
        "shots": protocol.shots,
        "seeds": protocol.seeds,
    }
    if protocol.name == "class-incremental":
        del facts["shots"]  # all images of a session are learned from
        facts |= {"split": protocol.split, "order": protocol.order}

    if plugins := config.learner.get("with"):
        facts["with"] = [row if isinstance(row, str) else row["name"] for row in plugins]
    if protocol.targets or config.target.names:
        facts["targets"] = protocol.targets or config.target.names
    if config.target.names:
        facts["target_start"] = f"{config.target.start} of the source prompts of this run"
    return facts


def _protocol(config: ClassificationConfig) -> str:
    """Return what a protocol is called: one with a teacher and unlabelled images is transductive."""
    name = config.protocol.name
    return f"{name}, {TRANSDUCTIVE}" if config.distil.teacher else name


def describe(
    record: RunRecord, config: ClassificationConfig, studies: Sequence[Study], results: Results
) -> None:
    """Set the title, the summary and the figures that open the page."""
    if len(studies) > 1:
        record.title = config.name
        methods = list(dict.fromkeys(study.method for study in studies))
        record.summary = f"{', '.join(methods)}."

        return

    single = studies[0].config
    data = single.meta.pairs if single.protocol.name == "meta" else ", ".join(single.data.names)
    record.title = f"{single.learner_name} on {data}"
    shots = f"{'/'.join(map(str, single.protocol.shots))} shots per class"
    if single.protocol.name == "class-incremental":
        shots = single.protocol.split
    scored = "" if single.data.split == "test" else ", on val"
    seeds = len(single.protocol.seeds)
    plural = "s" if seeds > 1 else ""
    drawn = f"{shots}, {seeds} seed{plural}{scored}"
    record.summary = f"{single.backbone.name}, {_protocol(single)}, {drawn}."
    base = "base/" if "base/accuracy" in record.metrics else ""
    headline = {
        "zero-shot": record.metrics.get(f"{base}zero_shot_accuracy"),
        "from scratch": record.metrics.get(f"scratch/{base}accuracy"),
        "learned": record.metrics.get(f"{base}accuracy"),
    }
    record.headline = {label: value for label, value in headline.items() if value is not None}

    if single.protocol.name == "transfer":
        text = "Accuracy of the column's task, tuned from the row's prompts, against tuned from scratch."
        record.drawings = {"What helps what": (text, matrix_of(results, single).figure())}


def add_curves(record: RunRecord, study: Study, results: Results) -> None:
    """Add accuracy against shots, where there are several numbers of shots."""
    config = study.config
    shots = config.target.shots or config.protocol.shots
    if config.protocol.name not in ("coop-fewshot", "multitask") or len(shots) < 2:
        return

    figures = protocol_of(config.protocol.name).summary(results, study)
    keys = {
        study.method: "shots{}/accuracy",
        "from scratch": "scratch/shots{}/accuracy",
        "zero-shot": "shots{}/zero_shot_accuracy",
    }
    curves = {}

    for label, key in keys.items():
        points = []
        for k in shots:
            name = key.format(k)
            if name in figures:
                points.append((k, figures[name], figures.get(f"{name}_ci95")))
        if points:
            curves[label] = points

    record.curves = curves


def add_history(record: RunRecord, folder: Path) -> None:
    """Add the learning curves of a cell."""
    record.history = read_jsonl(folder / "history.jsonl")


def add_templates(record: RunRecord, cells: Sequence[Cell], results: Results, folder: Path) -> None:
    """List the templates that cells found, with what they reach on the images that chose them and on others."""
    lines = []
    for cell in cells:
        path = folder / "cells" / cell.name / TEMPLATES
        if not path.is_file():
            continue

        where = ", ".join(f"{key} {value}" for key, value in cell.coordinates)
        figures = _figures_of(results.select(**cell.where))
        lines.append(f"{where}: {' | '.join(read_templates(path))} ({figures})")

    if lines:
        text = (
            "What was found. The best of many candidates looks better on the images that chose it than it is; "
            "compare the three accuracies."
        )
        record.listings = {**record.listings, "Templates": (text, lines)}


def _figures_of(results: Results) -> str:
    """Return accuracies on training, validation and test images, and their differences, in words."""
    train = results.select("learned/train_accuracy").values()
    val = results.select("learned/val_accuracy").values()
    test = results.select("accuracy", part=None).values() or results.select("accuracy", part="base").values()

    parts = {"train": train, "validation": val, "test": test}
    numbers = {name: values[0] for name, values in parts.items() if values}
    text = ", ".join(f"{name} {100 * value:.1f} %" for name, value in numbers.items())
    if "test" in numbers and len(numbers) > 1:
        gaps = [f"{name} - test {100 * (value - numbers['test']):+.1f}" for name, value in numbers.items()][
            :-1
        ]
        text = f"{text}; {', '.join(gaps)}"
    return text


def add_predictions(record: RunRecord, learner: Learner, test: ImageDataset, cache: FeatureCache) -> None:
    """Add predictions on a test set, with sample images."""
    learner, test = fitting(learner, test)
    test = test.with_label()  # a table of answers by true class has no row for others
    logits, labels = predict_logits(learner, test, cache=cache)
    record.classnames = list(test.classnames)
    record.labels = np.asarray(labels)
    record.probs = logits.softmax(-1).numpy()
    record.image = lambda index: test[index][0]
