"""Time and peak memory of a piece of work inside this process."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["Measured", "matrix_gflops", "measure"]


@dataclass(frozen=True)
class Measured:
    """Median wall-clock seconds, and the process's peak resident memory while the work ran (GiB, None if unknown)."""

    seconds: float
    peak_rss_gib: float | None


def measure(work: Callable[[], object], repeats: int = 3, warmup: int = 1) -> Measured:
    """Run ``work`` ``warmup + repeats`` times; the median of the counted runs is what is reported."""
    for _ in range(warmup):
        work()
    gc.collect()
    _reset_peak()
    times = []
    for _ in range(max(1, repeats)):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return Measured(statistics.median(times), _peak_gib())


def matrix_gflops(rows: int, inner: int, columns: int, seconds: float = 1.0) -> float:
    """Return the GFLOP/s of a plain float32 matrix product of this shape, the yardstick for a tower's own."""
    a, b = torch.randn(rows, inner), torch.randn(inner, columns)
    (a @ b).sum()
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        a @ b
        count += 1
    return 2e-9 * rows * inner * columns * count / (time.perf_counter() - started)


def _reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: start a new VmHWM
    except OSError:
        return


def _peak_gib() -> float | None:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20
