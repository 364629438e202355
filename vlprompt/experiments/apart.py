"""Work that an executor runs in parts, and that is no run: trials of a search, shards of images."""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path

from vlprompt.experiments.cell import Cell, CellResult, Failure, Outcome, Taken
from vlprompt.experiments.cell_folder import CellFolder
from vlprompt.experiments.executors import create_executor
from vlprompt.experiments.experiment import Experiment

__all__ = ["run_apart"]


def run_apart(
    on: str, experiment: Experiment, cells: Sequence[Cell], folder: Path
) -> Generator[tuple[Cell, CellResult | Failure], None, None]:
    """Run cells wherever ``on`` says, and yield what becomes of each as it ends; they need no other.

    Nothing is kept: what a cell does has to be safe to be done again.

    Args:
        on: An executor, for example ``"processes:4"``.
        experiment: Whose cells they are.
        cells: What to run.
        folder: Where cells have folders while they run.

    Raises:
        UnknownNameError: For an unknown executor.
        VLPromptError: If what stands behind its colon is not what it takes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (
        # Cells leave results behind, which would count as done in the next command.
        tempfile.TemporaryDirectory(prefix="command-", dir=folder, ignore_cleanup_errors=True) as own,
        create_executor(on, experiment) as executor,  # ends, and what it started, before the folder does
    ):
        run = Path(own)
        waiting = deque(CellFolder.of(run, cell) for cell in cells)
        executor.begin(run, cells, kept=False)
        running: dict[Future[Outcome], Cell] = {}
        while waiting or running:
            while waiting and len(running) < executor.slots:
                place = waiting.popleft()
                running[executor.submit(place)] = place.cell

            for future in wait(running, return_when=FIRST_COMPLETED).done:
                outcome = future.result()
                if isinstance(
                    outcome, Taken
                ):  # nobody else knows the folder: the claim was lost by a process that slept
                    outcome = Failure(f"it was stopped for so long that {outcome.holder} took it over")
                yield running.pop(future), outcome
