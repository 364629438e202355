"""One cell after the other, in this process."""

from __future__ import annotations

from concurrent.futures import Future

from vlprompt.core.errors import VLPromptError
from vlprompt.experiments.cell import Outcome
from vlprompt.experiments.cell_folder import CellFolder
from vlprompt.experiments.executors import EXECUTORS, Executor, run_cell
from vlprompt.experiments.experiment import Experiment

__all__ = ["SerialExecutor"]


@EXECUTORS.register("serial", summary="one cell after the other, in this process")
class SerialExecutor(Executor):
    """Runs a cell while it is submitted."""

    def __init__(self, experiment: Experiment, argument: str = "", attach: bool = False) -> None:
        super().__init__(experiment, argument, attach)
        self.check(argument)

    @classmethod
    def check(cls, argument: str) -> None:
        """See :meth:`Executor.check`."""
        if argument:
            raise VLPromptError(f"--on serial takes no number; got {argument!r}.")

    def submit(self, place: CellFolder) -> Future[Outcome]:
        """See :meth:`Executor.submit`."""
        future: Future[Outcome] = Future()
        future.set_result(run_cell(self.experiment, place))
        return future
