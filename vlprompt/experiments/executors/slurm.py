"""Cells in jobs of Slurm, through submitit: an array of jobs, each with cells of about the same cost together.

submitit is imported when it is asked for. Jobs leave results in the folders of their cells, so nothing is lost when the
terminal goes away: ``vlprompt run CFG --attach`` waits for them and writes the tables. ``--on slurm:local`` has the
same jobs as processes of this machine, through submitit's local executor, to try a configuration out.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from vlprompt.core.engine_options import Gibibytes, Minutes, read_options
from vlprompt.core.errors import VLPromptError, first_line
from vlprompt.core.process_marks import ProcessMark
from vlprompt.experiments.cell import Cell, Failure, Outcome
from vlprompt.experiments.cell_folder import CellFolder
from vlprompt.experiments.config import STRICT
from vlprompt.experiments.executors import EXECUTORS, Executor, PortableExperiment
from vlprompt.experiments.experiment import Experiment
from vlprompt.experiments.jobs import JOBS_FILE, Jobs, JobWork
from vlprompt.experiments.packing import expected_costs, pack

__all__ = ["SlurmExecutor", "SlurmOptions"]

log = logging.getLogger("vlprompt.run")

_LOCAL = "local"
_OF_A_CLUSTER = ("partition", "account", "qos", "constraint", "memory", "parallel")
_LOOK_SECONDS = 5.0  # between two looks at a cluster's queue
_LOCAL_LOOK_SECONDS = 0.2
_STOPPING_SECONDS = 5.0  # for controllers of this machine to end their jobs
_PATIENCE_SECONDS = 60.0  # for jobs of this machine to see that nothing is left


class SlurmOptions(BaseModel):
    """What stands behind ``slurm:``."""

    model_config = STRICT

    partition: str | None = Field(None, description="as of sbatch")
    account: str | None = Field(None, description="as of sbatch")
    qos: str | None = Field(None, description="as of sbatch")
    constraint: str | None = Field(None, description="as of sbatch")
    gpus: int = Field(0, ge=0, description="GPUs of a job")
    cpus: int = Field(1, ge=1, description="cores of a job")
    memory: Gibibytes | None = Field(None, description="memory of a job, for example 16GiB")
    time: Minutes = Field(60.0, description="after which a job is taken off and queued again, for example 4h")
    jobs: int = Field(16, ge=1, description="jobs that the cells are packed into")
    parallel: int = Field(256, ge=1, description="jobs that may run at the same time")
    requeues: int = Field(10, ge=0, description="how often a job that ran out of time is queued again")
    retries: int = Field(
        2, ge=0, description="how often jobs are submitted again for cells whose jobs were lost"
    )


@EXECUTORS.register(
    "slurm", summary="slurm:partition=NAME,gpus=1,time=4h ...: jobs of a Slurm cluster; slurm:local: here"
)
class SlurmExecutor(Executor):
    """Submits one array of jobs for all cells, and watches the folders of the cells."""

    slots = 1_000_000  # the jobs have all cells already
    has_queue = True
    outlives_command = True

    def __init__(self, experiment: Experiment, argument: str = "", attach: bool = False) -> None:
        super().__init__(experiment, argument, attach)
        self.local, self.options = _read(argument)
        idle = [name for name in _OF_A_CLUSTER if self.local and name in self.options.model_fields_set]
        if idle:
            log.warning("--on slurm:local: %s: of a cluster alone, without effect here", ", ".join(idle))
        self._submitit = _import_submitit()
        self._run = Path()
        self._kept = True
        self._cells: Sequence[Cell] = []
        self._jobs: Jobs | None = None
        self._retries = self.options.retries
        self._waiting: dict[Future[Outcome], CellFolder] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._broken: Failure | None = None  # why nobody watches the cells any more

    @classmethod
    def check(cls, argument: str) -> None:
        """See :meth:`Executor.check`."""
        _read(argument)
        _import_submitit()

    def begin(self, run: Path, cells: Sequence[Cell], kept: bool = True) -> None:
        """See :meth:`Executor.begin`."""
        self._run = run.absolute()
        self._kept = kept
        self._cells = cells
        self._jobs = Jobs.read(run)
        runs = self._jobs is not None and self._jobs.run()

        if self._jobs is not None and runs:
            self._check_seen(self._jobs)
            log.info("waiting for jobs that an earlier command submitted: %s", ", ".join(self._jobs.arrays))
        elif not self.attach:
            for cell in cells:
                CellFolder.of(run, cell).forget_failure()
            self._submit_jobs(cells)

        threading.Thread(target=self._watch, daemon=True).start()

    def submit(self, place: CellFolder) -> Future[Outcome]:
        """See :meth:`Executor.submit`: the jobs have the cell already, and the future tells what comes of it."""
        future: Future[Outcome] = Future()
        with self._lock:
            if self._broken is None:
                self._waiting[future] = place
            else:
                future.set_result(self._broken)
        return future

    def close(self, error: BaseException | None = None) -> None:
        """See :meth:`Executor.close`: jobs on a cluster go on when a command is stopped, and say how to come back."""
        self._ended.set()
        if self._jobs is None or not self._jobs.run():
            return

        if error is None:
            self._let_end(self._jobs)
        elif not self._kept:
            _stop(self._jobs)
            self._wait_for_end(self._jobs)  # they write into a folder that is about to go
        elif self.local and isinstance(error, KeyboardInterrupt):
            _stop(self._jobs)
        elif self.local:
            log.warning("the jobs go on; the same command with --attach waits for them.")
        else:
            arrays = " ".join(self._jobs.arrays)
            log.warning(
                "the jobs go on; the same command with --attach waits for them, and `scancel %s` stops them.",
                arrays,
            )

    def _check_seen(self, jobs: Jobs) -> None:
        """Refuse, or say, that nobody here can tell whether jobs still run.

        Raises:
            VLPromptError: If they are of a cluster, and its commands aren't here.
        """
        advice = f"If none of them is left, delete {Jobs.folder(self._run) / JOBS_FILE}."
        if not jobs.controllers and shutil.which("squeue") is None:
            raise VLPromptError(
                f"jobs of a cluster work on this run ({', '.join(jobs.arrays)}), and this machine has no squeue, which "
                f"tells whether they still do. Use a machine of the cluster. {advice}"
            )
        if hosts := jobs.foreign_hosts():
            log.warning("whether the jobs still run is known on %s alone. %s", " and ".join(hosts), advice)

    def _submit_jobs(self, cells: Sequence[Cell]) -> None:
        """Submit an array of jobs.

        Raises:
            VLPromptError: If the cluster does not take it.
        """
        options = self.options
        cluster = _LOCAL if self.local else "slurm"
        packs = pack(expected_costs(self.experiment, self._run, cells), options.jobs)
        work = JobWork(PortableExperiment.of(self.experiment), self._run, cells, options.cpus)

        try:
            executor = self._submitit.AutoExecutor(
                Jobs.folder(self._run),
                cluster,
                local_max_num_timeout=options.requeues,
                slurm_max_num_timeout=options.requeues,
            )
            executor.update_parameters(
                name=f"vlprompt-{self.experiment.config.name}"[:60],
                timeout_min=math.ceil(options.time),
                gpus_per_node=options.gpus,
                cpus_per_task=options.cpus,
                stderr_to_stdout=True,
                **({} if options.memory is None else {"mem_gb": options.memory}),
                **({} if self.local else self._slurm_parameters()),
            )
            with _apart_from_terminal(Jobs.folder(self._run)) if self.local else contextlib.nullcontext():
                jobs = executor.map_array(work, packs)
        except (RuntimeError, OSError, ValueError, subprocess.SubprocessError) as error:
            raise VLPromptError(f"Slurm did not take the jobs: {first_line(error)}") from error

        names = tuple(str(job.job_id) for job in jobs)
        controllers = tuple(ProcessMark.of(int(name)) for name in names) if self.local else ()
        self._jobs = Jobs(f"slurm:{self.argument}", names, controllers)
        self._jobs.write(self._run)
        log.info("%d cells in %d jobs: %s", len(cells), len(packs), ", ".join(self._jobs.arrays))

    def _slurm_parameters(self) -> dict[str, str | int]:
        """Return what only Slurm understands."""
        named = {
            "slurm_partition": self.options.partition,
            "slurm_account": self.options.account,
            "slurm_qos": self.options.qos,
            "slurm_constraint": self.options.constraint,
        }
        return {
            "slurm_array_parallelism": self.options.parallel,
            **{key: value for key, value in named.items() if value is not None},
        }

    def _watch(self) -> None:
        """Tell what cells come to, until the run ends; an error is told too, else the run would wait for ever."""
        try:
            self._look()
        except Exception as error:
            with self._lock:
                self._broken = Failure.of(error)
                waiting, self._waiting = self._waiting, {}
            for future in waiting:
                future.set_result(self._broken)

    def _look(self) -> None:
        """Look at the folders of the cells, and at the jobs, until the run ends."""
        pause = _LOCAL_LOOK_SECONDS if self.local else _LOOK_SECONDS
        while not self._ended.wait(pause):
            runs = (
                self._jobs is not None and self._jobs.run()
            )  # before the folders: then all they left is there
            with self._lock:
                waiting = dict(self._waiting)
            for future, place in waiting.items():
                self._settle(future, _what_came_of(place))

            with self._lock:
                left = dict(self._waiting)
            if left and not runs and not self._submit_again():
                for future, place in left.items():
                    self._settle(future, _what_came_of(place) or self._loss())

    def _settle(self, future: Future[Outcome], answer: Outcome | None) -> None:
        if answer is not None:
            with self._lock:
                del self._waiting[future]
            future.set_result(answer)

    def _submit_again(self) -> bool:
        """Submit jobs for the cells whose jobs are gone; return whether that was tried and worked."""
        left = [cell for cell in self._cells if _what_came_of(CellFolder.of(self._run, cell)) is None]
        if self.attach or self._retries == 0 or not left:
            return False

        self._retries -= 1
        log.warning("the jobs ended with %d cells unfinished: they are submitted again", len(left))
        try:
            self._submit_jobs(left)
        except VLPromptError as error:
            log.error("%s", error)
            return False
        return True

    def _loss(self) -> Failure:
        return Failure(
            f"its job ended before it was finished: it was killed, lost its node, or ran out of time "
            f"{self.options.requeues + 1} times. What the jobs said: {Jobs.folder(self._run)}."
        )

    def _let_end(self, jobs: Jobs) -> None:
        """Take the jobs that wait out of the queue; those that run find nothing left to do."""
        if not self.local:
            _cancel(jobs, "--state=PENDING")
            return

        self._wait_for_end(jobs)
        _stop(jobs)

    def _wait_for_end(self, jobs: Jobs) -> None:
        """Wait for jobs that have nothing left to do, but not for ever."""
        pause = _LOCAL_LOOK_SECONDS if self.local else _LOOK_SECONDS
        limit = time.monotonic() + _PATIENCE_SECONDS
        while jobs.run() and time.monotonic() < limit:
            time.sleep(pause)


def _stop(jobs: Jobs) -> None:
    """End jobs, those that run too."""
    if not jobs.controllers:
        _cancel(jobs)
    for mark in jobs.controllers:
        if mark.runs():
            with contextlib.suppress(OSError):
                os.kill(mark.process, signal.SIGINT)

    limit = time.monotonic() + _STOPPING_SECONDS
    while jobs.controllers and jobs.run() and time.monotonic() < limit:
        time.sleep(_LOCAL_LOOK_SECONDS)


@contextlib.contextmanager
def _apart_from_terminal(folder: Path) -> Iterator[None]:
    """Let processes that are started meanwhile write errors into a file: controllers end with a stack after Ctrl-C."""
    folder.mkdir(parents=True, exist_ok=True)
    terminal = os.dup(2)
    try:
        with (folder / "controllers.log").open("ab") as file:
            os.dup2(file.fileno(), 2)
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)


def _cancel(jobs: Jobs, *options: str) -> None:
    with contextlib.suppress(OSError):
        subprocess.run(["scancel", *options, *jobs.arrays], capture_output=True)


def _what_came_of(place: CellFolder) -> Outcome | None:
    """Return the result of a cell or why it failed; None if neither is there yet."""
    try:
        return place.result() or place.failure()
    except VLPromptError as error:  # a damaged file
        return Failure.of(error)


def _read(argument: str) -> tuple[bool, SlurmOptions]:
    """Return whether jobs are to run on this machine, and the options."""
    words, options = read_options("slurm", argument, SlurmOptions)
    if set(words) - {_LOCAL}:
        raise VLPromptError(f"--on slurm takes key=value, or the word local; got {' and '.join(words)}.")
    return _LOCAL in words, options


def _import_submitit() -> Any:
    try:
        import submitit
    except ImportError:
        raise VLPromptError("--on slurm needs submitit: pip install 'vlprompt[slurm]'.") from None
    return submitit
