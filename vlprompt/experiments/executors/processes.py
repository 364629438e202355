"""Several processes on this machine, through loky.

Every slot has a pool of one worker: where a worker is killed, exactly its own cell fails, and a new worker takes the
slot.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from loky import ProcessPoolExecutor

from vlprompt.core.memory import keep_freed_memory
from vlprompt.core.processes import divide_threads, set_threads
from vlprompt.experiments.cell import Cell, CellResult, Failure
from vlprompt.experiments.executors import EXECUTORS, Executor, run_cell, whole_number
from vlprompt.experiments.experiment import Experiment
from vlprompt.training.callbacks import Callback

__all__ = ["ProcessesExecutor"]

_WATCH_SECONDS = 0.5
_experiments: dict[str, Experiment] = {}  # of a worker: built once, for all its cells


@EXECUTORS.register("processes", summary="processes:N: N cells at the same time on this machine")
class ProcessesExecutor(Executor):
    """Runs N cells at the same time; each has its share of the machine's threads."""

    def __init__(self, experiment: Experiment, argument: str = "") -> None:
        super().__init__(experiment, argument)
        self.slots = whole_number(argument, "processes")
        self._free: list[ProcessPoolExecutor | None] = [None] * self.slots
        self._busy: list[ProcessPoolExecutor] = []

    def submit(self, cell: Cell, folder: Path) -> Future[CellResult | Failure]:
        """See :meth:`Executor.submit`."""
        pool = self._free.pop() or self._start()
        self._busy.append(pool)

        experiment = self.experiment
        answer = pool.submit(_work, type(experiment), experiment.config, experiment.callbacks, cell, folder)
        future: Future[CellResult | Failure] = Future()
        answer.add_done_callback(lambda done: self._finish(pool, done, future))
        return future

    def close(self) -> None:
        """See :meth:`Executor.close`."""
        for pool in [*self._busy, *self._free]:
            if pool is not None:
                pool.shutdown(wait=True, kill_workers=True)

    def _start(self) -> ProcessPoolExecutor:
        threads = divide_threads(self.slots)
        environment = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        level = logging.getLogger().level
        return ProcessPoolExecutor(
            max_workers=1, env=environment, initializer=_prepare, initargs=(os.getpid(), threads, level)
        )

    def _finish(self, pool: ProcessPoolExecutor, done: Any, future: Future[CellResult | Failure]) -> None:
        """Hand an answer on, and free the slot; a pool whose worker died is replaced by the next cell's."""
        self._busy.remove(pool)
        error = done.exception()
        self._free.append(pool if error is None else None)

        if error is None:
            future.set_result(done.result())
        else:
            codes = re.search(r"\{.*\}", str(error))  # loky's sentence has the exit codes in braces
            reason = f" {codes.group()}" if codes else f": {error}"
            future.set_result(Failure(f"the process that ran it was killed or crashed{reason}."))


def _prepare(parent: int, threads: int, level: int) -> None:
    logging.basicConfig(level=level, format="%(message)s")
    set_threads(threads)
    keep_freed_memory()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this worker when the process that started it is gone: a killed run must not go on behind its back."""
    while os.getppid() == parent:
        time.sleep(_WATCH_SECONDS)
    os._exit(1)


def _work(
    kind: type[Experiment], config: Any, callbacks: tuple[Callback, ...], cell: Cell, folder: Path
) -> CellResult | Failure:
    key = f"{kind.__module__}.{kind.__qualname__} {config.model_dump_json()}"
    if key not in _experiments:
        _experiments.clear()
        _experiments[key] = kind(config)
        _experiments[key].callbacks = callbacks
    answer = run_cell(_experiments[key], cell, folder)
    return answer.without_error() if isinstance(answer, Failure) else answer
