"""Which process something belongs to, told apart from every other one, on this machine and on others."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["ProcessMark"]


@dataclass(frozen=True)
class ProcessMark:
    """One process.

    Attributes:
        host: Name of its machine, for people.
        machine: Tells machines apart, and in containers their numberings of processes; another one after a restart.
        process: Its number there.
        begin: When it began, in the clock ticks of its machine: numbers are given again. Empty where nobody can say.
    """

    host: str
    machine: str
    process: int
    begin: str

    @classmethod
    def of(cls, process: int) -> ProcessMark:
        """Return the mark of a process of this machine, by its number."""
        return cls(socket.gethostname(), _machine(), process, _begin(process))

    @classmethod
    def here(cls) -> ProcessMark:
        """Return the mark of this process."""
        return cls.of(os.getpid())

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> ProcessMark:
        """Return what :meth:`record` described.

        Raises:
            KeyError: If something is missing.
            ValueError: If the number is none.
        """
        return cls(str(record["host"]), str(record["machine"]), int(record["process"]), str(record["begin"]))

    def record(self) -> dict[str, Any]:
        """Return the mark as JSON-able data."""
        return asdict(self)

    def runs(self) -> bool | None:
        """Return whether the process still runs; None if this machine can't say, since it belongs to another one."""
        if self.machine != _machine():
            return None
        if self.begin:
            return _begin(self.process) == self.begin
        if os.name != "posix":  # elsewhere a signal of 0 would end the process
            return None

        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return False
        except (OSError, OverflowError):
            return None
        return None  # the number may have been given to another process

    def may_run(self) -> bool:
        """Return whether the process may still run: not if its machine, which names tell apart, was started again."""
        if self.machine != _machine() and self.host == socket.gethostname():
            return False
        return self.runs() is not False


@cache
def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        processes = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return socket.gethostname()
    return f"{socket.gethostname()}/{boot}/{processes}"


def _begin(process: int) -> str:
    """Return when a process of this machine began; empty if it is gone, or if the system doesn't tell."""
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""

    # Behind the name, which stands in brackets and may hold any sign, follow the state and eighteen numbers.
    fields = text.rpartition(")")[2].split()
    gone = fields[0] in ("Z", "X")
    return "" if gone else fields[19]
