"""Where cells run: in this process, in several, on a cluster. One file each, discovered.

Results are equal to the bit wherever a cell runs.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from vlprompt.core.errors import CheckpointError, VLPromptError
from vlprompt.core.processes import process_state
from vlprompt.core.registry import Registry
from vlprompt.core.shares import lost_process, process_count, shared_work
from vlprompt.data.loading import using_workers
from vlprompt.experiments.cell import Cell, CellResult, Failure, Outcome, Taken
from vlprompt.experiments.cell_folder import CellFolder
from vlprompt.experiments.experiment import Experiment
from vlprompt.training.callback_lists import track_result, using_callbacks
from vlprompt.training.callbacks import Callback

__all__ = [
    "EXECUTORS",
    "Executor",
    "PortableExperiment",
    "check_executor",
    "compute_cell",
    "create_executor",
    "run_cell",
    "whole_number",
]

_LOOK_SECONDS = 0.5  # between two looks at a cell that another process has


class Executor(ABC):
    """Runs cells.

    Args:
        experiment: Whose cells.
        argument: What stands behind the colon of ``--on NAME:ARGUMENT``; empty if nothing does.
        attach: Only wait for what an earlier command started.

    Raises:
        VLPromptError: If it doesn't take the argument, its package isn't installed, or nothing of it outlives the
            command, so that there is nothing to attach to.
    """

    slots: int = 1  # cells that may be submitted at the same time
    has_queue: bool = False  # whether a cell that is submitted may wait for a place
    outlives_command: bool = False  # whether what was submitted goes on when the command has ended

    def __init__(self, experiment: Experiment, argument: str = "", attach: bool = False) -> None:
        self.experiment = experiment
        self.argument = argument
        self.attach = attach
        if attach and not self.outlives_command:
            raise VLPromptError("--attach waits for jobs in a queue: those of --on slurm.")

    @classmethod
    @abstractmethod
    def check(cls, argument: str) -> None:
        """Refuse an argument at once, before anything is loaded for the run.

        Args:
            argument: See :class:`Executor`.

        Raises:
            VLPromptError: If the executor doesn't take it, or its package isn't installed.
        """

    def begin(self, run: Path, cells: Sequence[Cell], kept: bool = True) -> None:
        """Called once before the first cell is submitted; does nothing by default.

        Args:
            run: The run's folder.
            cells: All that are not finished yet, in order.
            kept: Whether the folder stays when the command ends. If not, nothing may go on without the command.
        """

    @abstractmethod
    def submit(self, place: CellFolder) -> Future[Outcome]:
        """Start a cell; the future never raises: what goes wrong is a :class:`Failure`.

        Whoever computes the cell does so with :func:`run_cell`, which leaves the result in the cell's folder.
        """

    def close(self, error: BaseException | None = None) -> None:
        """Stop what still runs, and give everything back.

        Args:
            error: What ended the run before its time.
        """

    def __enter__(self) -> Executor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(error)


EXECUTORS: Registry[type[Executor]] = Registry("executor", "vlprompt.experiments.executors")
"""Every executor by name."""


def check_executor(spec: str) -> None:
    """Refuse what ``--on`` can't mean, at once; arguments and errors as of :func:`create_executor`."""
    name, _, argument = spec.partition(":")
    EXECUTORS.get(name).target.check(argument)


def create_executor(spec: str, experiment: Experiment, attach: bool = False) -> Executor:
    """Build what ``--on`` names, for example ``"serial"`` or ``"processes:4"``.

    Raises:
        UnknownNameError: For an unknown executor.
        VLPromptError: If the part behind the colon is not what the executor takes, or its package isn't installed.
    """
    name, _, argument = spec.partition(":")
    return EXECUTORS.get(name).target(experiment, argument, attach)


@dataclass(frozen=True)
class PortableExperiment:
    """What another process builds an experiment from.

    Attributes:
        kind: Its class.
        config: Its configuration.
        callbacks: What takes part in its trainings.
    """

    kind: type[Experiment]
    config: Any
    callbacks: tuple[Callback, ...] = ()

    @classmethod
    def of(cls, experiment: Experiment) -> PortableExperiment:
        """Return what describes an experiment."""
        return cls(type(experiment), experiment.config, experiment.callbacks)

    def build(self) -> Experiment:
        """Return the experiment; in one process the same one each time, with what its cells share."""
        key = f"{self.kind.__module__}.{self.kind.__qualname__} {self.config.model_dump_json()}"
        if key not in _experiments:
            _experiments.clear()
            _experiments[key] = self.kind(self.config)
            _experiments[key].callbacks = self.callbacks
        return _experiments[key]

    def run(self, place: CellFolder, log: bool = False) -> Outcome:
        """Run a cell in this process, for another one; arguments as of :func:`run_cell`."""
        answer = run_cell(self.build(), place, log)
        return answer.without_error() if isinstance(answer, Failure) else answer


_experiments: dict[str, Experiment] = {}  # of a worker: built once, for all its cells


def run_cell(experiment: Experiment, place: CellFolder, log: bool = False) -> Outcome:
    """Run one cell in this process, unless another one does, and leave what comes of it in its folder.

    A cell is owned by the process that has the claim on its folder, from before the first file is read until after the
    last one is written. A cell that was finished in the meantime is not run again.

    Args:
        experiment: Whose cell.
        place: The cell's folder.
        log: Write what the process says into the folder; what a cell that finishes says is removed.

    Raises:
        ProcessLostError: If another process of this run is gone: no further cell could be computed.
    """
    claim = place.claims.take()
    while (
        claim is None and process_count() > 1
    ):  # the others of a torchrun are at this cell, and can't leave it out
        time.sleep(_LOOK_SECONDS)
        claim = place.claims.take()
    if claim is None:
        return Taken(str(place.claims.holder() or "another process"))

    with claim:
        finished = place.result()
        if finished is not None:
            return finished

        place.forget_failure()
        with place.logged() if log else nullcontext():
            answer = compute_cell(experiment, place)
        if claim.lost:  # thought dead: what its successor leaves counts
            return place.result() or Taken("another process")

        try:
            place.keep(answer)
        except CheckpointError as error:
            return Failure.of(error)
        return answer


def compute_cell(experiment: Experiment, place: CellFolder) -> CellResult | Failure:
    """Return what a cell comes to; an exception becomes a :class:`Failure`.

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
            result = experiment.run(place.cell, place.path)
            if process_state().is_main_process:
                track_result(place.path, result.numbers())
            return result
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
    if not argument.isdecimal() or int(argument) < 1:
        raise VLPromptError(f"--on {executor}:N takes a number of processes above 0; got {argument!r}.")
    return int(argument)
