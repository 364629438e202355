"""Jobs in the queue of a cluster: which ones work on a run, and what one of them does."""

from __future__ import annotations

import json
import logging
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlprompt.core.errors import CheckpointError
from vlprompt.core.files import write_json
from vlprompt.core.memory import keep_freed_memory
from vlprompt.core.process_marks import ProcessMark
from vlprompt.core.processes import set_threads
from vlprompt.experiments.cell import Cell, Taken
from vlprompt.experiments.cell_folder import CellFolder
from vlprompt.experiments.executors import PortableExperiment

__all__ = ["JOBS_FILE", "JobWork", "Jobs", "queued_on"]

log = logging.getLogger("vlprompt.run")

JOBS_FILE = "jobs.json"
"""What tells later commands of a run's jobs."""

_LOOK_SECONDS = 1.0  # between two looks at cells that other jobs have
_ASKING_SECONDS = 60  # squeue may take long where a cluster is busy


@dataclass(frozen=True)
class Jobs:
    """The jobs that were submitted for a run.

    Attributes:
        on: What ``--on`` named.
        names: Their ids; those of an array begin with the array's and a ``_``.
        controllers: Of jobs on this machine, the processes that control them; empty for jobs of a cluster.
    """

    on: str
    names: tuple[str, ...]
    controllers: tuple[ProcessMark, ...] = ()

    @staticmethod
    def folder(run: Path) -> Path:
        """Return where the files and logs of a run's jobs lie."""
        return run / "jobs"

    @classmethod
    def read(cls, run: Path) -> Jobs | None:
        """Return the jobs that were submitted last for a run; None if there were none."""
        path = cls.folder(run) / JOBS_FILE
        if not path.is_file():
            return None

        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            marks = tuple(ProcessMark.from_record(mark) for mark in record["controllers"])
            return cls(str(record["on"]), tuple(str(name) for name in record["names"]), marks)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} is damaged ({error}). Delete it if no job of the run is left."
            ) from error

    def write(self, run: Path) -> None:
        """Let later commands know of the jobs."""
        controllers = [mark.record() for mark in self.controllers]
        record = {"on": self.on, "names": list(self.names), "controllers": controllers}
        write_json(self.folder(run) / JOBS_FILE, record)

    @property
    def arrays(self) -> list[str]:
        """The ids that the cluster's commands take: of an array one for all its jobs."""
        return sorted({name.partition("_")[0] for name in self.names})

    def foreign_hosts(self) -> list[str]:
        """Return the machines whose processes nobody here can see, so that these jobs would be waited for for ever."""
        return sorted({mark.host for mark in self.controllers if mark.runs() is None and mark.may_run()})

    def run(self) -> bool:
        """Return whether one of them runs or waits; True where nobody can say.

        ``squeue`` is asked: it knows without a database of accounts, which small clusters lack.
        """
        if self.controllers:
            return any(mark.may_run() for mark in self.controllers)

        for array in self.arrays:
            try:
                answer = subprocess.run(
                    ["squeue", "--noheader", "--format=%i", f"--jobs={array}"],
                    capture_output=True,
                    text=True,
                    errors="replace",
                    timeout=_ASKING_SECONDS,
                )
            except (OSError, subprocess.TimeoutExpired):
                return True
            unknown = answer.returncode != 0 and "invalid job id" in answer.stderr.lower()
            if answer.stdout.strip() or (answer.returncode != 0 and not unknown):
                return True
        return False


def queued_on(run: Path) -> str:
    """Return what ``--on`` named when jobs were submitted for a run.

    Raises:
        CheckpointError: If there were none.
    """
    jobs = Jobs.read(run)
    if jobs is None:
        raise CheckpointError(
            f"no command has left jobs of {run} in a queue: there is nothing to attach to. Start them with --on slurm."
        )
    return jobs.on


@dataclass(frozen=True)
class JobWork:
    """What one job does: the cells of its pack, then those that no other job has begun.

    Jobs don't talk to each other: the claim on a cell's folder says who has it, and what is there says whether it is
    finished or has failed. A job that was preempted or that ran out of time is queued again, and goes on from the
    checkpoints of its cells.

    Attributes:
        experiment: What the cells belong to.
        run: The run's folder, from the root.
        cells: All that were unfinished when the jobs were submitted, in order.
        threads: That a cell computes with.
    """

    experiment: PortableExperiment
    run: Path
    cells: Sequence[Cell]
    threads: int = 1

    def __call__(self, pack: Sequence[Cell]) -> None:
        """Work until nothing of the pack is left, and nothing of others that could be begun."""
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        set_threads(self.threads)
        keep_freed_memory()

        own = set(pack)
        left = [*pack, *(cell for cell in reversed(self.cells) if cell not in own)]
        finished = {cell.name for cell in self.experiment.build().cells()} - {cell.name for cell in left}
        failed: set[str] = set()

        while left:
            if self._run_one(left, finished, failed):
                continue
            if not own & set(left):
                return
            time.sleep(_LOOK_SECONDS)  # what is left of the pack needs cells that other jobs have

    def checkpoint(self, pack: Sequence[Cell]) -> Any:
        """Called by submitit before the job is taken off its node: return what is queued again, the same work.

        Trainings write their state every ``train.checkpoint_seconds``; leaving the process gives the claim back.
        """
        from submitit.helpers import DelayedSubmission  # there, since submitit calls this

        return DelayedSubmission(self, pack)

    def _run_one(self, left: list[Cell], finished: set[str], failed: set[str]) -> bool:
        """Run the first cell that can be; return whether one was, or whether something has come from elsewhere."""
        news = False
        for cell in list(left):
            place = CellFolder.of(self.run, cell)
            if failed & set(cell.needs) or place.failure() is not None:
                failed.add(cell.name)
                left.remove(cell)
                news = True
            elif place.result() is not None:
                finished.add(cell.name)
                left.remove(cell)
                news = True
            elif set(cell.needs) <= finished and place.claims.holder() is None:
                answer = self.experiment.run(place, log=True)
                if isinstance(answer, Taken):
                    continue
                log.info("%s: %s", cell.name, type(answer).__name__)
                return True
        return news
