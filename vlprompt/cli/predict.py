"""``vlprompt predict``: name images with a saved learner."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlprompt.cli._backbone import BackboneChanges, backbone_changes
from vlprompt.cli._errors import on_interrupt
from vlprompt.cli._progress import count_progress
from vlprompt.cli._shards import ColumnOption, OnOption, refuse_given, run_shards
from vlprompt.cli._workers import WorkersOption, parse_workers
from vlprompt.core.errors import DataError

if TYPE_CHECKING:
    from vlprompt.classification.predict import Classifier, Ranker
    from vlprompt.learners import Learner

__all__ = ["command"]


def command(
    prompt: Annotated[
        str,
        typer.Argument(
            help="A learner: its folder, its run's, its name on the Hub, or an exported .onnx file."
        ),
    ],
    images: Annotated[
        list[str],
        typer.Argument(help="Image files, or folders of them; or tar:PATTERN or parquet:PATTERN, shards."),
    ],
    topk: Annotated[int, typer.Option(min=1, help="Names per image.")] = 5,
    names: Annotated[
        list[str] | None,
        typer.Option(
            "--class",
            metavar="NAME",
            help="A class name to choose from instead of those trained on; repeat it.",
        ),
    ] = None,
    backbone: BackboneChanges = None,
    workers: WorkersOption = "auto",
    names_file: Annotated[
        Path | None,
        typer.Option(
            "--names",
            metavar="FILE",
            help="Very many class names to choose from, a line each; encoded once, into the folder FILE.names.",
        ),
    ] = None,
    nearest: Annotated[
        bool, typer.Option("--nearest", help="Of --names, look at near ones only, by an index of faiss.")
    ] = False,
    csv: Annotated[Path | None, typer.Option(help="Write the table here instead of printing it.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Of shards, where to write a Parquet file for each; needed there.")
    ] = None,
    on: OnOption = "serial",
    column: ColumnOption = "image",
) -> int:
    """Name images: a line per image with the likeliest classes.

    Exit status: 0; 1 if an image could not be read; 2 after a mistake.
    """
    if any(image.startswith(("tar:", "parquet:")) for image in images):
        given = {"--names": names_file is not None, "--nearest": nearest, "--csv": csv is not None}
        refuse_given(given, "is for single images and folders; shards have --class and --output.", "predict")
        return _predict_shards(prompt, images, output, names, topk, backbone, workers, on, column)
    if output is not None or on != "serial":
        raise DataError(
            "--output and --on are for shards, tar:PATTERN or parquet:PATTERN; a table goes to --csv."
        )

    refuse_given({"--column": column != "image"}, "is for parquet:PATTERN; a folder has none.", "predict")
    refuse_given(
        {"--nearest": nearest and names_file is None}, "is for --names FILE, which is missing.", "predict"
    )
    both = names_file is not None and bool(names)
    refuse_given({"--class": both}, "--names FILE says the names already: give one of them.", "predict")

    from vlprompt.classification import predict as predicting
    from vlprompt.core.files import write_text
    from vlprompt.saved.prompts import load

    classifier: Classifier | Ranker
    if prompt.endswith(".onnx"):
        classifier = _exported(prompt, names, names_file, backbone)
    else:
        learner = load(prompt, backbone_changes(backbone))
        classifier = predicting.for_classes(learner, names) if names else learner
        if names_file is not None:
            classifier = _listed(learner, names_file, nearest)
    count = parse_workers(workers)
    tables = [predicting.predict(classifier, image, topk, workers=count) for image in images]
    rows = [row for table in tables for row in table]
    joined = predicting.PredictionTable(rows)
    if csv is not None:
        write_text(csv, joined.to_csv())
    else:
        print(joined)

    unreadable = sum(bool(row["error"]) for row in rows)
    if unreadable:
        print(f"{unreadable} of {len(rows)} images could not be read.", file=sys.stderr)
    return 1 if unreadable else 0


def _listed(learner: Learner, names: Path, nearest: bool) -> Ranker:
    """Return what names images by a long list, which is encoded first if it isn't yet."""
    import torch

    from vlprompt.classification.name_list import NameList, build_name_list

    learner.to("cuda" if torch.cuda.is_available() else "cpu")
    folder = names.with_name(f"{names.name}.names")
    with on_interrupt("The same command goes on."), count_progress() as progress:
        build_name_list(learner, names, folder, progress=progress)
    return NameList(learner, folder, nearest=nearest)


def _predict_shards(
    prompt: str,
    images: Sequence[str],
    output: Path | None,
    names: list[str] | None,
    topk: int,
    backbone: list[str] | None,
    workers: str,
    on: str,
    column: str,
) -> int:
    """Name the images of shards, and return the exit status."""
    from vlprompt.shards.job import Job

    if len(images) > 1:
        raise DataError("shards are named by one pattern; write {0000..0099} or *, in quotation marks.")
    if output is None:
        raise DataError("--output FOLDER: say where the results of shards are to be written.")

    job = Job(
        kind="predict",
        data=images[0],
        folder=str(output),
        prompt=prompt,
        backbone=backbone_changes(backbone),
        classnames=names,
        topk=topk,
        column=column,
        workers=parse_workers(workers),
    )
    outcome, status = run_shards(job, on)
    print(outcome.folder / "parts")
    return status


def _exported(
    path: str, names: Sequence[str] | None, names_file: Path | None, backbone: Sequence[str] | None
) -> Classifier:
    """Return a classifier from a file, whose classes and weights are what they are.

    Raises:
        ConfigError: If others are asked for.
        ExportError: If it can't be read.
    """
    from vlprompt.core.errors import ConfigError
    from vlprompt.saved.exported import ExportedClassifier

    problems = [
        f"{option}: an exported file has its own {what}; export the learner again to change them."
        for option, what, asked in (
            ("--class", "classes", names),
            ("--names", "classes", names_file),
            ("--backbone", "weights", backbone),
        )
        if asked
    ]
    if problems:
        raise ConfigError(problems, "vlprompt predict")
    return ExportedClassifier(path)
