"""What a machine has and does beside a benchmark: memory, and the processors' other work."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vlprompt.core.errors import VLPromptError

__all__ = [
    "MemoryNeedError",
    "Noise",
    "NoiseWatch",
    "bounded_memory",
    "memory_limit",
    "require_memory",
    "status_gib",
]

_GIB = 2**30
_QUIET = 0.15  # processors busy with other work, on average, below which a machine counts as quiet
_SHORTEST = 0.5  # seconds; the system counts in steps of 10 ms, so that less says nothing
_LIMIT_FILES = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_SECONDS_BETWEEN_LOOKS = 0.1


class MemoryNeedError(VLPromptError):
    """A benchmark would need more than half of the machine's memory."""


@dataclass(frozen=True)
class Noise:
    """What else the machine did while something was timed.

    Attributes:
        others: Processors that were busy with other programs, on average.
        stolen: Processors that the host of a virtual machine took away, on average.
        seconds: How long was watched.
    """

    others: float
    stolen: float
    seconds: float

    @property
    def quiet(self) -> bool:
        """Whether figures of the clock can be trusted."""
        return self.seconds < _SHORTEST or self.others + self.stolen < _QUIET

    def warning(self) -> str:
        """Return a sentence about a machine that is not quiet."""
        return (
            f"the machine is not quiet: beside this timing {self.others:.2f} processors were busy with other work and "
            f"{self.stolen:.2f} were taken by the host. Ratios of processor time are the safer ones."
        )


class NoiseWatch:
    """Counts from now on what the machine does beside this process and its children."""

    def __init__(self) -> None:
        self._clock = time.perf_counter()
        self._own = _own_seconds()
        self._system = _system_seconds()

    def noise(self) -> Noise | None:
        """Return what happened since the start; None where the system doesn't tell."""
        now = _system_seconds()
        if now is None or self._system is None:
            return None

        seconds = max(time.perf_counter() - self._clock, 1e-9)
        busy = now[0] - self._system[0]
        others = max(0.0, busy - (_own_seconds() - self._own))
        return Noise(others / seconds, (now[1] - self._system[1]) / seconds, seconds)


def memory_limit() -> int:
    """Return how many bytes a benchmark may hold: half of the machine's memory, or of what its control group allows."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in _LIMIT_FILES:
        try:
            text = Path(name).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            total = min(total, int(text))
    return total // 2


def require_memory(size: int, what: str, advice: str) -> None:
    """Refuse what is known to need too much.

    Args:
        size: Bytes.
        what: What needs them, as the subject of a sentence.
        advice: What to do instead.

    Raises:
        MemoryNeedError: If it is more than half of the memory.
    """
    limit = memory_limit()
    if size > limit:
        raise MemoryNeedError(
            f"{what} needs about {size / _GIB:.1f} GiB, and a benchmark may take half of this machine's memory, "
            f"{limit / _GIB:.1f} GiB. {advice}"
        )


@contextmanager
def bounded_memory() -> Iterator[None]:
    """While open, end this process with a sentence and status 2 if it holds more than half of the machine's memory."""
    finished = threading.Event()
    limit = memory_limit() / _GIB

    def watch() -> None:
        while not finished.wait(_SECONDS_BETWEEN_LOOKS):
            held = status_gib("VmRSS")
            if held is not None and held > limit:
                print(
                    f"error: stopped at {held:.1f} GiB: a benchmark may take half of this machine's memory, "
                    f"{limit:.1f} GiB. Use fewer classes or a smaller batch.",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(2)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


def status_gib(field: str) -> float | None:
    """Return a field of ``/proc/self/status`` that is a size, in GiB; None where there is none."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return int(status.split(f"{field}:")[1].split()[0]) / 2**20


def _own_seconds() -> float:
    """Return seconds of processors that this process and its ended children took."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _system_seconds() -> tuple[float, float] | None:
    """Return seconds that all processors worked, and that were stolen, since the machine started."""
    try:
        first = Path("/proc/stat").read_text().splitlines()[0]
    except (OSError, IndexError):
        return None

    user, nice, system, _, _, irq, softirq, stolen = (int(number) for number in first.split()[1:9])
    ticks = os.sysconf("SC_CLK_TCK")
    return (user + nice + system + irq + softirq) / ticks, stolen / ticks
