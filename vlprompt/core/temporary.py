"""Temporary neighbours of files that are being written, and the removal of those that a kill left behind."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import socket
import time
from functools import cache
from pathlib import Path

from vlprompt.core.process_marks import ProcessMark

__all__ = ["remove_left_behind", "temporary_neighbour"]

_NAME = re.compile(r"\.[0-9a-f]{8}\.(?P<machine>[0-9a-f]{8})-(?P<process>\d+)-[0-9a-f]{8}\.part")
_COST = 20  # looking through a folder may take one part in so many of the time
_next: dict[Path, float] = {}  # folder to the moment from which it may be looked through again


def temporary_neighbour(path: Path) -> Path:
    """Return a free name beside a file that says which process writes it.

    The name is short, however long the file's is, and hidden, so that no listing takes it for data.
    """
    name = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]
    return path.with_name(f".{name}.{_machine()}-{os.getpid()}-{secrets.token_hex(4)}.part")


def remove_left_behind(folder: Path) -> None:
    """Remove temporary files of processes that don't run any more.

    Files of other machines stay, since nobody here can say whether they are still written. A folder of many files is
    looked through more rarely, so that writing all of them doesn't take quadratic time.
    """
    started = time.monotonic()
    if started < _next.get(folder, 0.0):
        return

    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            match = _NAME.fullmatch(entry.name)
            if match and match["machine"] == _machine() and _gone(int(match["process"])):
                with contextlib.suppress(OSError):
                    os.unlink(entry.path)

    ended = time.monotonic()
    _next[folder] = ended + _COST * (ended - started)


@cache
def _machine() -> str:
    """Return 8 hex digits of the machine and, in a container, of its own numbering of processes."""
    try:
        processes = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        processes = 0
    return hashlib.sha256(f"{socket.gethostname()}/{processes}".encode()).hexdigest()[:8]


def _gone(process: int) -> bool:
    """Return whether no process of this machine has the number; False where nobody can say."""
    return ProcessMark.of(process).runs() is False
