"""Where cells run: in this process, in several, later on a cluster. One file each, discovered.

Results are equal to the bit wherever a cell runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType

from vlprompt.core.errors import VLPromptError
from vlprompt.core.registry import Registry
from vlprompt.core.shares import lost_process, shared_work
from vlprompt.data.loading import using_workers
from vlprompt.experiments.cell import Cell, CellResult, Failure
from vlprompt.experiments.experiment import Experiment
from vlprompt.training.callback_lists import using_callbacks

__all__ = ["EXECUTORS", "Executor", "create_executor", "run_cell"]


class Executor(ABC):
    """Runs cells.

    Args:
        experiment: Whose cells.
        argument: What stands behind the colon of ``--on NAME:ARGUMENT``; empty if nothing does.
    """

    slots: int = 1  # cells that run at the same time

    def __init__(self, experiment: Experiment, argument: str = "") -> None:
        self.experiment = experiment
        self.argument = argument

    @abstractmethod
    def submit(self, cell: Cell, folder: Path) -> Future[CellResult | Failure]:
        """Start a cell; the future never raises: what goes wrong is a :class:`Failure`."""

    def close(self) -> None:
        """Stop what still runs, and give everything back."""

    def __enter__(self) -> Executor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


EXECUTORS: Registry[type[Executor]] = Registry("executor", "vlprompt.experiments.executors")
"""Every executor by name."""


def create_executor(spec: str, experiment: Experiment) -> Executor:
    """Build what ``--on`` names, for example ``"serial"`` or ``"processes:4"``.

    Raises:
        UnknownNameError: For an unknown executor.
        VLPromptError: If the part behind the colon is not what the executor takes.
    """
    name, _, argument = spec.partition(":")
    return EXECUTORS.get(name).target(experiment, argument)


def run_cell(experiment: Experiment, cell: Cell, folder: Path) -> CellResult | Failure:
    """Run one cell here; an exception becomes a :class:`Failure`.

    Raises:
        ProcessLostError: If another process of this run is gone: no further cell could be computed.
    """
    try:
        tracking = experiment.config.tracking
        with (
            shared_work(),  # all processes run the same cells
            using_workers(experiment.config.loading.workers),
            using_callbacks(tracking.trackers, tracking.project, experiment.callbacks),
        ):
            return experiment.run(cell, folder)
    except Exception as error:  # hours of finished cells must survive whatever one of them does
        lost = lost_process(error)
        if lost is not None:
            raise lost from error
        return Failure.of(error)


def whole_number(argument: str, executor: str) -> int:
    """Return a number of processes.

    Raises:
        VLPromptError: If it is no whole number above 0.
    """
    if not argument.isdigit() or int(argument) < 1:
        raise VLPromptError(f"--on {executor}:N takes a number of processes above 0; got {argument!r}.")
    return int(argument)
