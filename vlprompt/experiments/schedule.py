"""Which cell is started when: each behind those that it needs, and none that another process works on."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait

from vlprompt.experiments.cell import Cell, CellResult, Failure, Outcome, Taken
from vlprompt.experiments.executors import Executor
from vlprompt.experiments.folder import RunFolder
from vlprompt.training.callbacks import Callback

__all__ = ["Progress", "Schedule"]

log = logging.getLogger("vlprompt.run")

Progress = Callable[[str, int, int], None]
"""Called with (what, done, total)."""

_LOOK_SECONDS = 0.5  # between two looks at cells that other processes work on


class Schedule:
    """Runs the cells that are not finished; their results are written where they are computed.

    Args:
        executor: Where cells run.
        folder: The run's.
        cells: All of them, in order.
        finished: Those that need not run; those that finish are added.
        progress: Called with (name of the run, cells done, cells).
        callbacks: Told of every cell that finishes.
    """

    def __init__(
        self,
        executor: Executor,
        folder: RunFolder,
        cells: Sequence[Cell],
        finished: dict[Cell, CellResult],
        progress: Progress | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.executor = executor
        self.folder = folder
        self.cells = cells
        self.finished = finished
        self.progress = progress
        self.callbacks = callbacks

        self._waiting = [cell for cell in cells if cell not in finished]
        self._running: dict[Future[Outcome], Cell] = {}
        self._elsewhere: list[Cell] = []  # cells that other processes have
        self._failures: dict[Cell, Failure] = {}

    def run(self) -> dict[Cell, Failure]:
        """Run everything; return why cells did not finish."""
        self._report()
        if self._waiting:
            self.executor.begin(self.folder.path, list(self._waiting))

        while self._waiting or self._running or self._elsewhere:
            self._drop_hopeless()
            self._start()
            self._wait()
            self._look_elsewhere()

        return self._failures

    def _start(self) -> None:
        done = {cell.name for cell in self.finished}
        ready = [cell for cell in self._waiting if set(cell.needs) <= done]
        for cell in ready[: self.executor.slots - len(self._running)]:
            self._waiting.remove(cell)
            number = len(self.finished) + len(self._failures) + len(self._running) + 1
            level = logging.DEBUG if self.executor.has_queue else logging.INFO
            log.log(level, "%s (%d of %d)", cell.name, number, len(self.cells))
            self._running[self.executor.submit(self.folder.cell(cell))] = cell

    def _wait(self) -> None:
        """Take what cells have come to, at least one unless all that is left is elsewhere."""
        if not self._running:
            if self._elsewhere:
                time.sleep(_LOOK_SECONDS)
            return

        limit = _LOOK_SECONDS if self._elsewhere else None
        for future in wait(self._running, limit, return_when=FIRST_COMPLETED).done:
            cell = self._running.pop(future)
            answer = future.result()
            if isinstance(answer, Taken):
                log.info("%s is left to %s", cell.name, answer.holder)
                self._elsewhere.append(cell)
            elif isinstance(answer, Failure):
                log.error("%s failed: %s", cell.name, answer.message)
                self._fail(cell, answer)
            else:
                self._finish(cell, answer)

    def _look_elsewhere(self) -> None:
        """Take the results of other processes; what they let go of without one is run here."""
        for cell in list(self._elsewhere):
            place = self.folder.cell(cell)
            held = place.claims.holder() is not None  # before the result: it may come between the two
            result = place.result()
            if result is not None:
                self._elsewhere.remove(cell)
                self._finish(cell, result)
            elif not held:
                self._elsewhere.remove(cell)
                self._waiting.append(cell)

    def _finish(self, cell: Cell, result: CellResult) -> None:
        self.finished[cell] = result
        for callback in self.callbacks:
            callback.on_cell(cell.where, result.numbers())
        self._report()

    def _fail(self, cell: Cell, failure: Failure) -> None:
        self._failures[cell] = failure
        place = self.folder.cell(cell)
        written = place.failure()
        if (
            written is None or written.message != failure.message
        ):  # a process that was killed could not write it
            place.keep(failure)
        self._report()

    def _drop_hopeless(self) -> None:
        """Fail the cells that need one that failed, and those that need them in turn."""
        failed = {cell.name for cell in self._failures}
        for cell in list(self._waiting):
            lost = [name for name in cell.needs if name in failed]
            if lost:
                self._waiting.remove(cell)
                self._failures[cell] = Failure(f"it needs {lost[0]}, which did not finish", mistake=True)
                self.folder.cell(cell).keep(self._failures[cell])
                failed.add(cell.name)

    def _report(self) -> None:
        if self.progress is not None:
            self.progress(self.folder.parent.name, len(self.finished) + len(self._failures), len(self.cells))
