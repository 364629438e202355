"""``vlprompt evaluate``: score a saved learner on a data set."""

from __future__ import annotations

import json
from collections import Counter
from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from vlprompt.cli._backbone import BackboneChanges, backbone_changes
from vlprompt.cli._workers import WorkersOption, parse_workers
from vlprompt.core.errors import DataError

if TYPE_CHECKING:
    from vlprompt.data import ImageDataset
    from vlprompt.learners import Learner

__all__ = ["command"]


class Part(str, Enum):
    """Which classes of a data set are scored."""

    ALL = "all"
    BASE = "base"
    NEW = "new"


class LabelSpace(str, Enum):
    """Which classes an image competes against."""

    LEARNER = "learner"
    DATA = "data"


def command(
    prompt: Annotated[str, typer.Argument(help="A saved learner's folder, or the folder of its run.")],
    data: Annotated[str, typer.Option(help="A data set: a name, folder:PATH, csv:PATH or tar:PATTERN.")],
    split: Annotated[str | None, typer.Option(help="train, val or test.  [default: test]")] = None,
    everything: Annotated[
        bool,
        typer.Option("--all", help="Score every image of a folder, table or archive, whatever its splits."),
    ] = False,
    classes: Annotated[
        Part, typer.Option(help="The first half of the classes, the rest, or all.")
    ] = Part.ALL,
    label_space: Annotated[
        LabelSpace | None,
        typer.Option(
            help="Classes an image competes against.  [default: the learner's, if it knows those of the data; the "
            "data's if it knows none of them]"
        ),
    ] = None,
    root: Annotated[str | None, typer.Option(help="Where data sets lie.")] = None,
    backbone: BackboneChanges = None,
    workers: WorkersOption = "auto",
) -> None:
    """Score a saved learner on a data set, and print its metrics as JSON, with the counts that they are of."""
    if everything and split is not None:
        raise DataError(f"--all scores every image, --split {split} a part of them: give one of the two.")

    from vlprompt.classification import evaluate as evaluating
    from vlprompt.core.processes import process_state
    from vlprompt.core.shares import shared_work
    from vlprompt.data import load_dataset
    from vlprompt.saved.prompts import load

    learner = load(prompt, backbone_changes(backbone))
    part = "all" if everything else split or "test"
    dataset = load_dataset(data, part, classes=classes.value, root=root)
    space = label_space or _label_space(learner, dataset)
    if space is LabelSpace.DATA:
        learner, dataset = _in_data_space(learner, dataset)

    record = {"data": dataset.name, "split": part, "label_space": space.value, **_counts(learner, dataset)}
    process_state()  # meets the other processes of a torchrun
    with shared_work():
        scores = evaluating.evaluate(learner, dataset, workers=parse_workers(workers))
    print(json.dumps({**record, **scores}, indent=2))


def _label_space(learner: Learner, data: ImageDataset) -> LabelSpace:
    """Return the label space where none was asked for."""
    from vlprompt.classification.label_space import known_classes

    known = known_classes(learner, data)
    if known == len(data.classnames):
        return LabelSpace.LEARNER
    if not known:
        return LabelSpace.DATA
    raise DataError(
        f"{data.name}: the learner knows {known} of its {len(data.classnames)} classes. To choose among the classes of "
        "the data: --label-space data. To choose among the learner's, leave out the images of other classes."
    )


def _in_data_space(learner: Learner, data: ImageDataset) -> tuple[Learner, ImageDataset]:
    from vlprompt.classification.label_space import fitting

    return fitting(learner, data)


def _counts(learner: Learner, data: ImageDataset) -> dict[str, object]:
    """Return how many images and classes a score is of."""
    counts = Counter(data.classnames[label] for sample in data.samples for label in sample.classes)
    skipped = {"skipped": data.info["skipped"]} if "skipped" in data.info else {}
    return {
        "images": len(data),
        "classes": len(learner.classnames),
        "images_per_class": {name: counts[name] for name in data.classnames},
        **skipped,
    }
