"""What all commands share: a user's mistake is a message, not a stack; who speaks; how Ctrl-C ends a command."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from vlprompt.core.errors import VLPromptError
from vlprompt.core.memory import keep_freed_memory
from vlprompt.core.names import printable

__all__ = [
    "INTERRUPTED",
    "LAST_NET",
    "USER_ERROR",
    "CommandGroup",
    "Commands",
    "exit_status",
    "on_interrupt",
    "say_last_net",
]

USER_ERROR = 2
"""Exit status after a user's mistake, the same that typer takes for a wrong option."""

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it: 128 + SIGINT."""


LAST_NET = (OSError, MemoryError, RecursionError, UnicodeError)
"""What may come from the system or a file anywhere in a command; it ends in one sentence."""


class CommandGroup(TyperGroup):
    """A group of commands whose help is instant."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the options before the command."""
        # typer's own flags default to None, which it checks with pydantic; that import takes longer than all of --help.
        for parameter in self.get_params(ctx):
            if parameter.default is None:
                parameter.default = False
        return super().parse_args(ctx, args)


class Commands(CommandGroup):
    """The root of all commands; what a command function returns is its exit status (None is 0)."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command, and leave with its exit status.

        Raises:
            typer.Exit: Always, unless something is wrong with vlprompt itself.
        """
        raise typer.Exit(exit_status(partial(super().invoke, ctx)))


def exit_status(body: Callable[[], int | None]) -> int:
    """Run the body of a program and return its exit status.

    A user's mistake is a message on standard error and status 2; so is Ctrl-C, with status 130.

    Args:
        body: Returns its status; None is 0.
    """
    _set_up_messages()
    keep_freed_memory()
    try:
        status = body()
        sys.stdout.flush()  # a full disk or a closed pipe shows here, not after the end
    except VLPromptError as error:
        print(f"{_speaker()}error: {error}", file=sys.stderr)
        status = USER_ERROR
    except KeyboardInterrupt:
        print("stopped.", file=sys.stderr)
        status = INTERRUPTED
    except LAST_NET as error:
        status = say_last_net(error)
    finally:
        if _is_launched():  # one sentence is enough
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _leave_process_group()

    return status or 0


def say_last_net(error: BaseException) -> int:
    """Turn what the system or a hostile file made fail into one sentence; return the exit status of a mistake."""
    if isinstance(error, BrokenPipeError):
        text = "standard output was closed before everything was written."
        _silence_output()
    elif isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        text = f"{where}{error.strerror or error}."
        _silence_output()
    elif isinstance(error, MemoryError):
        text = "there is not enough memory. Use fewer or smaller images, or a smaller batch."
    elif isinstance(error, RecursionError):
        text = "something is nested too deeply, for example a file of brackets in brackets."
    else:
        text = f"a text can't be read or written: {error}."

    with contextlib.suppress(OSError):
        print(printable(f"{_speaker()}error: {text}"), file=sys.stderr, flush=True)
    return USER_ERROR


def _silence_output() -> None:
    """Send what is still to be written to nowhere, if standard output takes no more: else Python says so at its end."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stdout.fileno())


@contextmanager
def on_interrupt(sentence: str) -> Iterator[None]:
    """Say after Ctrl-C how to go on.

    Raises:
        typer.Exit: With status 130.
    """
    try:
        yield
    except KeyboardInterrupt:
        print(f"stopped. {sentence}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None


class _CurrentStderr(logging.StreamHandler):  # no type parameter: Python 3.10 takes none
    """Writes to whatever ``sys.stderr`` is at the moment: a progress bar replaces it to stay below the lines."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        self.stream = sys.stderr
        super().emit(record)


def _set_up_messages() -> None:
    """Let log lines go to standard error; of several processes of a ``torchrun`` only the first one speaks."""
    first = _rank() == 0
    level = logging.INFO if first else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", handlers=[_CurrentStderr()])
    for noisy in ("httpx", "urllib3", "open_clip"):
        logging.getLogger(noisy).setLevel(logging.WARNING)

    if _is_launched():
        signal.signal(signal.SIGTERM, _say_why_stopped)

    if not first:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - open until the process ends


def _say_why_stopped(signal_number: int, _: object) -> None:
    """End a process that ``torchrun`` stops because another one of the run is gone."""
    text = "another process of this run ended before its work was done. The same command continues the run."
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        print(f"{_speaker()}error: {text}", file=sys.stderr, flush=True)
    os._exit(
        128 + signal_number
    )  # destroying what connects the processes could wait for the one that is gone


def _is_launched() -> bool:
    """Return whether ``torchrun`` started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def _rank() -> int:
    """Return the number of this process in a ``torchrun``; 0 outside one."""
    rank = os.environ.get("RANK", "0")
    return int(rank) if rank.isdecimal() else 0


def _speaker() -> str:
    """Return what an error begins with: errors of other processes are not lost, and say whose they are."""
    return f"process {_rank()}: " if _rank() else ""


def _leave_process_group() -> None:
    """Say goodbye to the other processes of a ``torchrun``, if torch was needed at all."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
