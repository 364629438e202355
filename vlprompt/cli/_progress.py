"""Progress of long commands: bars on a terminal, otherwise a line from time to time. All of it on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import ProgressColumn

__all__ = ["count_progress", "download_progress"]

Show = Callable[[str, int, "int | None"], None]
"""Called with (what, done, total); a total of None is not known."""

_SECONDS = 10.0  # between two lines where there is no terminal


@contextmanager
def count_progress() -> Iterator[Show]:
    """Yield what shows the progress of things that are counted: cells, images."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with _progress(columns, lambda count: str(count), "") as show:
        yield show


@contextmanager
def download_progress() -> Iterator[Show]:
    """Yield what shows the progress of downloads, in bytes."""
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with _progress(columns, lambda count: f"{count / 1e6:.0f}", " MB") as show:
        yield show


@contextmanager
def _progress(columns: tuple[ProgressColumn, ...], number: Callable[[int], str], unit: str) -> Iterator[Show]:
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        with _bars(columns, console) as show:
            yield show
    else:
        yield _lines(number, unit)


@contextmanager
def _bars(columns: tuple[ProgressColumn, ...], console: Console) -> Iterator[Show]:
    from rich.progress import Progress, TaskID

    with Progress(*columns, console=console) as progress:
        bars: dict[str, TaskID] = {}

        def show(what: str, done: int, total: int | None) -> None:
            if what not in bars:
                bars[what] = progress.add_task(what, total=total)
            progress.update(bars[what], completed=done, total=total)

        yield show


def _lines(number: Callable[[int], str], unit: str) -> Show:
    last: dict[str, float] = {}

    def show(what: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        due = now - last.setdefault(what, now) > _SECONDS
        if not due and done != total:
            return

        last[what] = now
        of_total = f" of {number(total)}" if total else ""
        print(f"{what}: {number(done)}{of_total}{unit}", file=sys.stderr, flush=True)

    return show
