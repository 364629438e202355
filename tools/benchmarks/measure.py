"""Time and peak memory of a piece of work inside this process."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["Measured", "matrix_gflops", "measure"]


@dataclass(frozen=True)
class Measured:
    """What a piece of work took.

    Attributes:
        seconds: Median wall-clock seconds.
        cpu_seconds: Median seconds of all threads of this process; hardly moved by what else the machine does.
        peak_rss_gib: The process's peak resident memory while it ran, None if unknown.
        added_gib: How much of the peak was not resident before, None if unknown.
    """

    seconds: float
    cpu_seconds: float
    peak_rss_gib: float | None
    added_gib: float | None


def measure(work: Callable[[], object], repeats: int = 3, warmup: int = 1) -> Measured:
    """Run ``work`` ``warmup + repeats`` times; the median of the counted runs is what is reported."""
    for _ in range(warmup):
        work()

    gc.collect()

    with suppress(
        OSError, AttributeError
    ):  # glibc keeps what was freed; hand it back, or it hides the next peak
        ctypes.CDLL("libc.so.6").malloc_trim(0)

    before = _status_gib("VmRSS")
    _reset_peak()
    times = []
    cpu_times = []

    for _ in range(max(1, repeats)):
        started = time.perf_counter()
        cpu_started = time.process_time()
        work()
        times.append(time.perf_counter() - started)
        cpu_times.append(time.process_time() - cpu_started)

    peak = _status_gib("VmHWM")
    added = None if peak is None or before is None else max(0.0, peak - before)
    return Measured(statistics.median(times), statistics.median(cpu_times), peak, added)


def matrix_gflops(rows: int, inner: int, columns: int, seconds: float = 1.0) -> float:
    """Return the GFLOP/s of a plain float32 matrix product of this shape, the yardstick for a tower's own."""
    a = torch.randn(rows, inner)
    b = torch.randn(inner, columns)
    (a @ b).sum()
    started = time.perf_counter()
    count = 0

    while time.perf_counter() - started < seconds:
        a @ b
        count += 1

    return 2e-9 * rows * inner * columns * count / (time.perf_counter() - started)


def _reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: start a new VmHWM
    except OSError:
        return


def _status_gib(field: str) -> float | None:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return int(status.split(f"{field}:")[1].split()[0]) / 2**20
