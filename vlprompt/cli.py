"""What the command-line tools share: logging, and errors that are messages instead of stack traces."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence

from vlprompt.errors import VLPromptError

__all__ = ["command"]


def command(body: Callable[[Sequence[str]], int | None]) -> None:
    """Run a tool's ``main(arguments)`` and leave the process with its exit status.

    A user's mistake (any :class:`VLPromptError`) is printed to standard error and exits with 2; Ctrl-C exits
    with 130.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
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
    sys.exit(status or 0)
