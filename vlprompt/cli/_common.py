"""What the command-line tools share: logging, and errors that are messages instead of stack traces."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlprompt.core.errors import VLPromptError

__all__ = ["command", "step_progress"]


def command(body: Callable[[Sequence[str]], int | None]) -> None:
    """Run a tool's ``main(arguments)`` and leave the process with its exit status.

    A user's mistake (any :class:`VLPromptError`) is printed to standard error and exits with 2; Ctrl-C exits
    with 130.
    """
    first = os.environ.get("RANK", "0") == "0"  # of several processes only the first one speaks
    logging.basicConfig(
        level=logging.INFO if first else logging.ERROR, format="%(message)s", stream=sys.stderr
    )
    if not first:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - open until the process ends
    for noisy in ("httpx", "urllib3", "open_clip"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        status = body(sys.argv[1:])
    except VLPromptError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("stopped; --resume continues from the last checkpoint.", file=sys.stderr)
        status = 130
    _leave_process_group()
    sys.exit(status or 0)


@contextmanager
def step_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Yield a function of (what, done, total): a bar for each thing on a terminal, else a line every ten seconds."""
    from rich.console import Console  # here: --help needs none of it
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _progress_lines()
        return
    with Progress(
        *Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn(), console=console
    ) as bar:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)

        yield show


def _progress_lines() -> Callable[[str, int, int], None]:
    last = time.monotonic()

    def show(what: str, done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last > 10:
            last = time.monotonic()
            print(f"{what}: {done} of {total}", file=sys.stderr, flush=True)

    return show


def _leave_process_group() -> None:
    """Say goodbye to the other processes of a ``torchrun``, if torch was needed at all."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
