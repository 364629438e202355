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
from typing import Any

from loky import ProcessPoolExecutor

from vlprompt.core.memory import keep_freed_memory
from vlprompt.core.processes import divide_threads, set_threads
from vlprompt.experiments.cell import Failure, Outcome
from vlprompt.experiments.cell_folder import CellFolder
from vlprompt.experiments.executors import EXECUTORS, Executor, PortableExperiment, whole_number
from vlprompt.experiments.experiment import Experiment

__all__ = ["ProcessesExecutor"]

_WATCH_SECONDS = 0.5


@EXECUTORS.register("processes", summary="processes:N: N cells at the same time on this machine")
class ProcessesExecutor(Executor):
    """Runs N cells at the same time; each has its share of the machine's threads."""

    def __init__(self, experiment: Experiment, argument: str = "", attach: bool = False) -> None:
        super().__init__(experiment, argument, attach)
        self.slots = whole_number(argument, "processes")
        self._free: list[ProcessPoolExecutor | None] = [None] * self.slots
        self._busy: list[ProcessPoolExecutor] = []

    @classmethod
    def check(cls, argument: str) -> None:
        """See :meth:`Executor.check`."""
        whole_number(argument, "processes")

    def submit(self, place: CellFolder) -> Future[Outcome]:
        """See :meth:`Executor.submit`."""
        pool = self._free.pop() or self._start()
        self._busy.append(pool)

        answer = pool.submit(PortableExperiment.of(self.experiment).run, place)
        future: Future[Outcome] = Future()
        answer.add_done_callback(lambda done: self._finish(pool, done, future))
        return future

    def close(self, error: BaseException | None = None) -> None:
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

    def _finish(self, pool: ProcessPoolExecutor, done: Any, future: Future[Outcome]) -> None:
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
