"""One cell after the other, in this process."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path

from vlprompt.core.errors import VLPromptError
from vlprompt.experiments.cell import Cell, CellResult, Failure
from vlprompt.experiments.executors import EXECUTORS, Executor, run_cell
from vlprompt.experiments.experiment import Experiment

__all__ = ["SerialExecutor"]


@EXECUTORS.register("serial", summary="one cell after the other, in this process")
class SerialExecutor(Executor):
    """Runs a cell while it is submitted."""

    def __init__(self, experiment: Experiment, argument: str = "") -> None:
        if argument:
            raise VLPromptError(f"--on serial takes no number; got {argument!r}.")
        super().__init__(experiment)

    def submit(self, cell: Cell, folder: Path) -> Future[CellResult | Failure]:
        """See :meth:`Executor.submit`."""
        future: Future[CellResult | Failure] = Future()
        future.set_result(run_cell(self.experiment, cell, folder))
        return future
