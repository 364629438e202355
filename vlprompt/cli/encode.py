"""``vlprompt encode``: the features of images in shards, or of images and their captions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlprompt.cli._backbone import BackboneChanges, backbone_changes
from vlprompt.cli._shards import ColumnOption, OnOption, run_shards
from vlprompt.cli._workers import WorkersOption, parse_workers

__all__ = ["command"]


def command(
    data: Annotated[
        str, typer.Argument(help="tar:PATTERN (webdataset's archives) or parquet:PATTERN (lists).")
    ],
    output: Annotated[Path, typer.Option(help="Where to write, a Parquet file for each shard.")],
    backbone: BackboneChanges = None,
    pairs: Annotated[
        bool,
        typer.Option(
            "--pairs", help="Encode captions too; meta.pairs=encoded:FOLDER meta-trains on what is written."
        ),
    ] = False,
    on: OnOption = "serial",
    column: ColumnOption = "image",
    batch_size: Annotated[int, typer.Option(min=1, help="Images per pass.")] = 64,
    workers: WorkersOption = "0",
) -> int:
    """Encode the images of shards: unit-length features, a row per image.

    The same command continues with the shards that have no result yet.

    Exit status: 0; 1 if an image or a shard could not be read; 2 after a mistake.
    """
    from vlprompt.shards.job import Job

    job = Job(
        kind="pairs" if pairs else "encode",
        data=data,
        folder=str(output),
        backbone=backbone_changes(backbone),
        column=column,
        batch_size=batch_size,
        workers=parse_workers(workers),
    )
    outcome, status = run_shards(job, on)
    print(outcome.folder / "parts")
    return status
