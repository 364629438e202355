"""``vlprompt evaluate``: score a saved learner on a data set."""

from __future__ import annotations

import json
from enum import Enum
from typing import Annotated

import typer

from vlprompt.cli._backbone import BackboneChanges, backbone_changes

__all__ = ["command"]


class Part(str, Enum):
    """Which classes of a data set are scored."""

    ALL = "all"
    BASE = "base"
    NEW = "new"


def command(
    prompt: Annotated[str, typer.Argument(help="A saved learner's folder, or the folder of its run.")],
    data: Annotated[str, typer.Option(help="A data set: a name, folder:PATH or csv:PATH.")],
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    classes: Annotated[
        Part, typer.Option(help="The first half of the classes, the rest, or all.")
    ] = Part.ALL,
    root: Annotated[str | None, typer.Option(help="Where data sets lie.")] = None,
    backbone: BackboneChanges = None,
) -> None:
    """Score a saved learner on a data set, and print its metrics as JSON."""
    from vlprompt.classification import evaluate as evaluating
    from vlprompt.data import load_dataset
    from vlprompt.saved.prompts import load

    learner = load(prompt, backbone_changes(backbone))
    dataset = load_dataset(data, split, classes=classes.value, root=root)
    if learner.classnames != dataset.classnames:
        learner = learner.with_classes(dataset.classnames)
    metrics = evaluating.evaluate(learner, dataset)
    print(json.dumps({"data": dataset.name, "split": split, **metrics}, indent=2))
