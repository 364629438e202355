"""``vlprompt scan``: look for backdoor triggers in a folder of images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vlprompt.cli._backbone import BackboneChanges, backbone_changes
from vlprompt.cli._errors import on_interrupt
from vlprompt.cli._progress import count_progress
from vlprompt.cli._shards import ColumnOption, OnOption, refuse_given, run_shards
from vlprompt.cli._workers import WorkersOption, parse_workers
from vlprompt.core.errors import DataError

__all__ = ["SUSPECTED", "command"]

SUSPECTED = 3
"""Exit status if an image is suspected: scripts tell it from all went well and from an error."""

_FALSE_ALARMS = 0.05
_TOP = 200


def command(
    data: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER",
            help="Folder of images, searched at any depth; or tar:PATTERN or parquet:PATTERN, shards.",
        ),
    ],
    prompt: Annotated[
        str, typer.Option("--detector", help="The scanner: folder of a saved dbom learner, or of its run.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="Where to write.  [default: scans/NAME OF THE FOLDER]", show_default=False),
    ] = None,
    objects: Annotated[
        list[str] | None,
        typer.Option(
            "--object", metavar="NAME", help="An object to name instead of those trained on; repeat it."
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="Score in [0, 1] from which an image is suspected.  [default: the scanner's]"),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            metavar="CLEAN",
            help="Folder of clean images like those to scan: they set the threshold, with a promised rate.",
        ),
    ] = None,
    false_alarms: Annotated[
        float, typer.Option(help="Share of further clean images that --calibrate may let be suspected.")
    ] = _FALSE_ALARMS,
    backbone: BackboneChanges = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per pass.")] = 64,
    workers: WorkersOption = "auto",
    top: Annotated[int, typer.Option(min=0, help="Images on the sheet.")] = _TOP,
    links: Annotated[
        bool, typer.Option("--links/--no-links", help="Follow links to files outside the folder.")
    ] = True,
    resume: Annotated[bool, typer.Option("--resume", help="Continue behind the last verdict.")] = False,
    on: OnOption = "serial",
    column: ColumnOption = "image",
) -> int:
    """Look for backdoor triggers in a folder of images, or in shards.

    Of a folder, writes a table, a list of clean files and a sheet to look at; of shards, a Parquet file of verdicts for
    each, and the same command continues with the shards that have none.

    Exit status: 0 if nothing is suspected; 3 if something is; 1 if nothing is, but some images could not be read;
    2 after a mistake.
    """
    if data.startswith(("tar:", "parquet:")):
        _check_for_shards(calibrate, false_alarms, top, links)
        return _scan_shards(
            on,
            data=data,
            folder=str(output or Path("scans") / "shards"),
            prompt=prompt,
            backbone=backbone_changes(backbone),
            classnames=objects,
            threshold=threshold,
            column=column,
            batch_size=batch_size,
            workers=parse_workers(workers),
        )
    _check_for_folder(on, column, calibrate, false_alarms)

    import torch

    from vlprompt.learners import Learner
    from vlprompt.learners._scanning import ImageScanner
    from vlprompt.saved.prompts import load
    from vlprompt.security.folder import scan_folder
    from vlprompt.security.scan import calibrated

    learner: Learner = load(prompt, backbone_changes(backbone))
    if not isinstance(learner, ImageScanner):
        raise DataError(
            f"{prompt} holds {learner.method}, which can't scan. Train a scanner: vlprompt run dbom_tiny.yaml."
        )
    if objects:
        learner = learner.with_classes(objects)
        assert isinstance(learner, ImageScanner)
    folder = Path(data)
    learner.to("cuda" if torch.cuda.is_available() else "cpu")

    calibration = None
    if calibrate is not None:
        _refuse_both(threshold)
        calibration = calibrated(
            calibrate, learner, false_alarms, batch_size=batch_size, workers=parse_workers(workers)
        )
        print(f"{calibrate}: {calibration}")

    target = output or Path("scans") / (folder.resolve().name or "folder")
    with on_interrupt("With --resume the same command continues."), count_progress() as progress:
        outcome = scan_folder(
            folder,
            learner,
            target,
            threshold=threshold,
            calibration=calibration,
            resume=resume,
            batch_size=batch_size,
            workers=parse_workers(workers),
            top=top,
            follow_links=links,
            progress=progress,
        )
    print(f"{outcome.total} images: {outcome.poisoned} suspected, {outcome.unreadable} unreadable")
    for ending, count in sorted(outcome.passed_over.items()):
        print(
            f"{count} files {f'with the ending {ending}' if ending else 'without an ending'} were not looked at"
        )
    for name in ("report.csv", "report.json", "cleaned.txt", "report.html"):
        print(outcome.output / name)
    if outcome.poisoned:
        return SUSPECTED
    return 1 if outcome.unreadable else 0


def _scan_shards(on: str, **options: Any) -> int:
    """Scan shards, say where the verdicts lie, and return the exit status."""
    from vlprompt.shards.job import Job

    scanned, status = run_shards(Job(kind="scan", **options), on)
    print(f"{scanned.suspected} suspected: {scanned.folder / 'parts'}")
    return SUSPECTED if scanned.suspected else status


def _check_for_shards(calibrate: Path | None, false_alarms: float, top: int, links: bool) -> None:
    """Refuse what has an effect on folders alone."""
    given = {
        "--calibrate": calibrate is not None,
        "--false-alarms": false_alarms != _FALSE_ALARMS,
        "--top": top != _TOP,
        "--no-links": not links,
    }
    refuse_given(given, "is for a folder; shards have no sheet, and a threshold by --threshold.", "scan")


def _check_for_folder(on: str, column: str, calibrate: Path | None, false_alarms: float) -> None:
    """Refuse what has an effect on shards alone."""
    if on != "serial":
        raise DataError(
            f"--on {on} is for shards, tar:PATTERN or parquet:PATTERN; a folder is scanned by --workers."
        )
    refuse_given({"--column": column != "image"}, "is for parquet:PATTERN; a folder has none.", "scan")
    given = {"--false-alarms": calibrate is None and false_alarms != _FALSE_ALARMS}
    refuse_given(given, "is a promise of --calibrate CLEAN, which is missing.", "scan")


def _refuse_both(threshold: float | None) -> None:
    if threshold is not None:
        raise DataError(
            "--threshold and --calibrate both say from which score an image is suspected: give one."
        )
