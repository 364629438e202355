"""Cells as tasks of Ray, on a cluster that runs already or on one that is started here for the run.

Ray is imported when it is asked for. What every task needs, the description of the experiment, is put into the object
store once. Data and weights stay files: each worker process reads them once, for all its cells (see ``docs/scale.md``
for what was measured). A task whose worker dies is started again by Ray, and the cell goes on from its checkpoint.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlprompt.core.errors import first_line
from vlprompt.core.memory import keep_freed_memory
from vlprompt.core.processes import set_threads
from vlprompt.core.ray_cluster import RayCluster, RayOptions, import_ray, read_ray_options
from vlprompt.core.version import package_version
from vlprompt.experiments.cell import Cell, Failure, Outcome
from vlprompt.experiments.cell_folder import CellFolder
from vlprompt.experiments.executors import EXECUTORS, Executor, PortableExperiment
from vlprompt.experiments.experiment import Experiment

__all__ = ["RayExecutor"]

log = logging.getLogger("vlprompt.run")

_PASSED_ON = ("MKL_CBWR",)  # what results depend on, from this process's environment


@EXECUTORS.register(
    "ray", summary="ray[:ADDRESS][,cpus=1,gpus=0,memory=8GiB,retries=3]: tasks on a Ray cluster"
)
class RayExecutor(Executor):
    """Hands cells to Ray, which runs as many at the same time as the cluster has room for."""

    slots = 1000  # more than run: what waits makes a cluster grow that can
    has_queue = True

    def __init__(self, experiment: Experiment, argument: str = "", attach: bool = False) -> None:
        super().__init__(experiment, argument, attach)
        address, self.options = read_ray_options(argument, RayOptions)
        self._cluster = RayCluster(address, self.options.cores)
        self._cluster.check_room(self.options, "a cell")
        self._ray = self._cluster.ray
        self._pending: dict[Future[Outcome], Any] = {}

        self._description = self._ray.put(PortableExperiment.of(experiment))
        self._surroundings = _Surroundings(
            package_version(),
            os.getcwd(),
            self.options.threads,
            {name: os.environ[name] for name in _PASSED_ON if name in os.environ},
        )
        # With max_calls=0 a worker keeps the backbone for its next cell, on a GPU too.
        self._task = self._ray.remote(max_retries=self.options.retries, max_calls=0, **self.options.needs())(
            _work
        )

    @classmethod
    def check(cls, argument: str) -> None:
        """See :meth:`Executor.check`."""
        read_ray_options(argument, RayOptions)
        import_ray()

    def begin(self, run: Path, cells: Sequence[Cell], kept: bool = True) -> None:
        """See :meth:`Executor.begin`."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        cores = sum(node.get("CPU", 0.0) for node in nodes)
        gpus = sum(node.get("GPU", 0.0) for node in nodes)
        log.info("Ray: %d nodes with %g cores and %g GPUs", len(nodes), cores, gpus)

    def submit(self, place: CellFolder) -> Future[Outcome]:
        """See :meth:`Executor.submit`."""
        place = CellFolder(place.path.absolute(), place.cell)
        reference = self._task.remote(self._description, place, self._surroundings)

        future: Future[Outcome] = Future()
        self._pending[future] = reference
        reference.future().add_done_callback(lambda done: self._finish(done, place, future))
        return future

    def close(self, error: BaseException | None = None) -> None:
        """See :meth:`Executor.close`: cancels what runs or waits, and leaves the cluster."""
        for reference in list(self._pending.values()):
            self._ray.cancel(reference, force=True)
        self._cluster.leave()

    def _finish(self, done: Any, place: CellFolder, future: Future[Outcome]) -> None:
        """Hand an answer on, or say why a task has none."""
        self._pending.pop(future, None)
        try:
            error = done.exception()
        except BaseException as cancelled:  # a future that was cancelled raises this
            error = cancelled

        if error is None:
            future.set_result(done.result())
            return

        kinds = self._ray.exceptions
        if isinstance(error, kinds.RayTaskError):  # outside of what turns a cell's errors into failures
            future.set_result(Failure(first_line(error.cause), error.traceback_str))
            return

        if isinstance(error, kinds.OutOfMemoryError):
            text = f"Ray ended its worker for want of memory: give a cell more with memory=. Its log: {place.log}."
        elif isinstance(error, (kinds.WorkerCrashedError, kinds.NodeDiedError)):
            times = f"{self.options.retries + 1} times" if self.options.retries else "once"
            text = f"the Ray worker that ran it was killed or crashed, {times}. Its log: {place.log}."
        else:
            text = f"Ray: {first_line(error) if isinstance(error, Exception) else type(error).__name__}"
        future.set_result(Failure(text))


@dataclass(frozen=True)
class _Surroundings:
    """What a worker must have as the command has it.

    Attributes:
        version: Of the package.
        folder: The working directory, where names of files begin; entered where the worker has it too.
        threads: That a cell computes with.
        environment: Variables that results depend on.
    """

    version: str
    folder: str
    threads: int
    environment: Mapping[str, str]


def _work(description: PortableExperiment, place: CellFolder, surroundings: _Surroundings) -> Outcome:
    """Run a cell in a worker process of Ray."""
    if package_version() != surroundings.version:
        return Failure(
            f"the node {socket.gethostname()} has vlprompt {package_version()}, and this one {surroundings.version}: "
            "install the same.",
            mistake=True,
        )
    if not place.path.parent.parent.is_dir():
        return Failure(
            f"the node {socket.gethostname()} does not see {place.path.parent.parent}: output must name a folder that "
            "all nodes share.",
            mistake=True,
        )

    os.environ.update(surroundings.environment)
    if Path(surroundings.folder).is_dir():
        os.chdir(surroundings.folder)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    set_threads(surroundings.threads)
    keep_freed_memory()
    return description.run(place, log=True)
