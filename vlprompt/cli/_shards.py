"""What commands that work on shards share: where the work is done, and what they say of it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from vlprompt.cli._errors import on_interrupt
from vlprompt.cli._progress import count_progress

if TYPE_CHECKING:
    from vlprompt.shards.job import Job, JobOutcome

__all__ = ["ColumnOption", "OnOption", "run_shards"]

OnOption = Annotated[
    str,
    typer.Option(
        metavar="EXECUTOR",
        help="Of shards, where it is done: serial, processes:N, or ray[:ADDRESS][,gpus=1,memory=8GiB,workers=N ...].",
    ),
]

ColumnOption = Annotated[
    str,
    typer.Option(
        metavar="NAME", help="Of a Parquet list, the column with the images: bytes, or paths beside it."
    ),
]


def run_shards(job: Job, on: str) -> tuple[JobOutcome, int]:
    """Do a job and say what came of it; return it, and the exit status: 1 if a shard or an image has no result."""
    from vlprompt.shards.job import run_job

    with (
        on_interrupt("The same command continues with the shards that are left."),
        count_progress() as progress,
    ):
        outcome = run_job(job, on, progress)

    for part in outcome.failed:
        print(f"failed: {part.shard}: {part.error}", file=sys.stderr)
    for ending, count in outcome.left_out.items():
        print(f"{count} members with the ending {ending or 'of none'} were not looked at")
    print(f"{outcome.images} images in {len(outcome.parts)} shards: {outcome.unreadable} unreadable")
    return outcome, 1 if outcome.failed or outcome.unreadable else 0
