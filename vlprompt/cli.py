"""What the command-line tools share: logging, and errors that are messages instead of stack traces."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from vlprompt.errors import VLPromptError

__all__ = ["command"]


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


def _leave_process_group() -> None:
    """Say goodbye to the other processes of a ``torchrun``, if torch was needed at all."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
