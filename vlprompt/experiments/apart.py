"""Work that an executor runs in parts, and that is no run: trials of a search, shards of images."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path

from vlprompt.experiments.cell import Cell, CellResult, Failure
from vlprompt.experiments.executors import create_executor
from vlprompt.experiments.experiment import Experiment

__all__ = ["run_apart"]


def run_apart(
    on: str, experiment: Experiment, cells: Sequence[Cell], folder: Path
) -> Iterator[tuple[Cell, CellResult | Failure]]:
    """Run cells wherever ``on`` says, and yield what becomes of each as it ends; they need no other.

    Nothing is kept: what a cell does has to be safe to be done again.

    Args:
        on: An executor, for example ``"processes:4"``.
        experiment: Whose cells they are.
        cells: What to run.
        folder: Each cell has a folder of its own below it; it is made by whoever writes into it.

    Raises:
        UnknownNameError: For an unknown executor.
        VLPromptError: If what stands behind its colon is not what it takes.
    """
    waiting = deque(cells)
    running: dict[Future[CellResult | Failure], Cell] = {}
    with create_executor(on, experiment) as executor:
        while waiting or running:
            while waiting and len(running) < executor.slots:
                cell = waiting.popleft()
                running[executor.submit(cell, folder / cell.name)] = cell
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
