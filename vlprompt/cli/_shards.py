"""What commands that work on shards share: where the work is done, and what they say of it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from vlprompt.cli._errors import on_interrupt
from vlprompt.cli._progress import count_progress
from vlprompt.core.errors import ConfigError

if TYPE_CHECKING:
    from vlprompt.shards.job import Job, JobOutcome

__all__ = ["ColumnOption", "OnOption", "refuse_given", "run_shards"]

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


def refuse_given(given: Mapping[str, bool], why: str, command: str) -> None:
    """Refuse options that would have no effect.

    Args:
        given: Name of an option to whether it was given.
        why: Ends a sentence that begins with the name.
        command: Name of the command.

    Raises:
        ConfigError: With all of them at once.
    """
    problems = [f"{option}: {why}" for option, is_given in given.items() if is_given]
    if problems:
        raise ConfigError(problems, f"vlprompt {command}")


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
    for reason, count in outcome.left_out.items():
        if not reason:
            print(f"{count} members without an ending were not looked at")
        elif reason.startswith("."):
            print(f"{count} members with the ending {reason} were not looked at")
        else:
            print(f"{count} {reason}")
    print(f"{outcome.images} images in {len(outcome.parts)} shards: {outcome.unreadable} unreadable")
    return outcome, 1 if outcome.failed or outcome.unreadable else 0
