"""Time and peak memory of a piece of work inside this process, alone or in turns with a baseline."""

from __future__ import annotations

import ctypes
import gc
import logging
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.machine import NoiseWatch, status_gib

__all__ = ["Aside", "Measured", "Turns", "Work", "in_turns", "matrix_gflops", "measure"]

log = logging.getLogger("benchmarks")

Work = Callable[[], object]
"""What is timed. If it returns an :class:`Aside`, that is taken off its times."""


@dataclass
class Aside:
    """What a run did beside the way that it stands for, for example again because memory did not suffice.

    Attributes:
        seconds: Of the clock.
        cpu_seconds: Of all threads of this process.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """While open, time is added here."""
        started = time.perf_counter()
        cpu_started = time.process_time()
        yield
        self.seconds += time.perf_counter() - started
        self.cpu_seconds += time.process_time() - cpu_started


@dataclass(frozen=True)
class Measured:
    """What a piece of work took.

    Attributes:
        seconds: Median wall-clock seconds.
        cpu_seconds: Median seconds of all threads of this process; hardly moved by what else the machine does.
        peak_rss_gib: The process's peak resident memory while it ran, None if unknown.
        added_gib: How much of the peak was not resident before, None if unknown.
        page_faults: Median of how often the system had to hand the process a page of memory, without a disk.
        quiet: False if other programs or the machine's host took processors meanwhile.
    """

    seconds: float
    cpu_seconds: float
    peak_rss_gib: float | None
    added_gib: float | None
    page_faults: float = 0.0
    quiet: bool = True


@dataclass(frozen=True)
class Turns:
    """Several ways of the same work, timed in turns.

    Attributes:
        runs: Every counted run of each way, in the order of the rounds.
        quiet: False if other programs or the machine's host took processors meanwhile.
    """

    runs: Mapping[str, list[Measured]] = field(repr=False)
    quiet: bool

    def __getitem__(self, way: str) -> Measured:
        """Return the medians of one way, and its highest peak."""
        return _summary(self.runs[way], self.quiet)

    def ratio(self, way: str, over: str) -> float:
        """Return the seconds of one way over those of another: the median over rounds."""
        return statistics.median(a.seconds / max(b.seconds, 1e-9) for a, b in self._pairs(way, over))

    def cpu_ratio(self, way: str, over: str) -> float:
        """Return the processor time of one way over that of another: the median over rounds."""
        return statistics.median(a.cpu_seconds / max(b.cpu_seconds, 1e-9) for a, b in self._pairs(way, over))

    def half_precision(self) -> dict[str, float]:
        """Return figures of the way ``half``, beside ``fast`` in float32 and ``naive``, where that was run."""
        measured = self["half"]
        figures = {
            "seconds": measured.seconds,
            "cpu_seconds": measured.cpu_seconds,
            "over_fp32": self.ratio("fast", "half"),
        }
        if "naive" in self.runs:
            figures["speedup"] = self.ratio("naive", "half")
        return figures

    def _pairs(self, way: str, over: str) -> Iterator[tuple[Measured, Measured]]:
        return zip(self.runs[way], self.runs[over], strict=True)


def measure(work: Work, repeats: int = 3, warmup: int = 1) -> Measured:
    """Run ``work`` ``warmup + repeats`` times; the median of the counted runs is what is reported."""
    for _ in range(warmup):
        work()
    watch = NoiseWatch()
    runs = [_run(work, trim=number == 0) for number in range(max(1, repeats))]

    return _summary(runs, _was_quiet(watch))


def in_turns(works: Mapping[str, Work], repeats: int = 3, warmup: int = 1) -> Turns:
    """Run several ways in turns, so that a machine whose speed drifts takes from all alike.

    Args:
        works: By name.
        repeats: Counted rounds; every other one goes through the ways backwards.
        warmup: Runs of each before the first round.
    """
    for _ in range(warmup):
        for work in works.values():
            work()

    watch = NoiseWatch()
    runs: dict[str, list[Measured]] = {name: [] for name in works}
    for number in range(max(1, repeats)):
        for name in works if number % 2 == 0 else reversed(list(works)):
            runs[name].append(_run(works[name], trim=number == 0))
    return Turns(runs, _was_quiet(watch))


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


def _run(work: Work, trim: bool) -> Measured:
    """Run once.

    Args:
        work: What is run.
        trim: Hand freed memory back to the system before, or it hides the peak. The next runs find it in place, as the
            next batches of a user do.
    """
    gc.collect()
    if trim:
        with suppress(OSError, AttributeError):  # not glibc
            ctypes.CDLL("libc.so.6").malloc_trim(0)

    before = status_gib("VmRSS")
    _reset_peak()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    started = time.perf_counter()
    cpu_started = time.process_time()
    answer = work()
    seconds = time.perf_counter() - started
    cpu_seconds = time.process_time() - cpu_started

    if isinstance(answer, Aside):
        seconds -= answer.seconds
        cpu_seconds -= answer.cpu_seconds

    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    peak = status_gib("VmHWM")
    added = None if peak is None or before is None else max(0.0, peak - before)
    return Measured(seconds, cpu_seconds, peak, added, faults)


def _summary(runs: list[Measured], quiet: bool) -> Measured:
    """Return medians of times, and the highest peak."""
    peaks = [run.peak_rss_gib for run in runs if run.peak_rss_gib is not None]
    added = [run.added_gib for run in runs if run.added_gib is not None]
    return Measured(
        statistics.median(run.seconds for run in runs),
        statistics.median(run.cpu_seconds for run in runs),
        max(peaks, default=None),
        max(added, default=None),
        statistics.median(run.page_faults for run in runs),
        quiet,
    )


def _was_quiet(watch: NoiseWatch) -> bool:
    """Return whether the machine was quiet, and warn if it was not."""
    noise = watch.noise()
    if noise is None or noise.quiet:
        return True
    log.warning("%s", noise.warning())
    return False


def _reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: start a new VmHWM
    except OSError:
        return
