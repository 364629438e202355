"""A real Slurm: jobs that are preempted, killed, and left alone by the command that submitted them.

Runs where ``tests/slurm_node.sh`` has started Slurm's daemons: ``tests/slurm_node.sh make test-slurm``.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.experiments.clusters import kill, owners, start, wait_for
from tests.experiments.test_executors import check_that_work_apart_ends, finished, run_of, tables, toy
from vlprompt.core.errors import VLPromptError
from vlprompt.experiments.jobs import Jobs
from vlprompt.experiments.runner import run_experiment

PARTITION = os.environ.get("VLPROMPT_TEST_SLURM", "")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PARTITION, reason="no Slurm: run it with tests/slurm_node.sh make test-slurm"),
]


def queue(array: str) -> str:
    return subprocess.run(
        ["squeue", "--noheader", "--format=%i %T", f"--jobs={array}"], capture_output=True, text=True
    ).stdout.strip()


def jobs_of(run: Path) -> list[str]:
    path = run / "jobs" / "jobs.json"
    return json.loads(path.read_text())["names"] if path.exists() else []


def test_preempted_jobs_go_on_without_the_command_and_another_one_collects(tmp_path: Path) -> None:
    options = {"seeds": [1], "seconds": 2.0, "diary": str(tmp_path / "diary")}
    run = run_of(tmp_path, **options)
    command = start({"output": str(tmp_path), **options}, on=f"slurm:partition={PARTITION},jobs=2,time=20m")
    wait_for(lambda: owners(run), "a job that has begun a cell")
    names = jobs_of(run)
    assert len(names) == 2
    kill(command.pid)
    command.wait()
    subprocess.run(
        ["scancel", "--signal=USR2", *names], check=True
    )  # as before a preemption or the end of its time

    collected = run_experiment(toy(tmp_path, **options), attach=True)
    assert collected.exit_code == 0
    assert jobs_of(run) == names
    attempts = [line.split()[0] for line in (tmp_path / "diary").read_text().splitlines()]
    assert len(attempts) > len(set(attempts)) == 4
    assert "DUE TO JOB REQUEUE" in "".join(path.read_text() for path in (run / "jobs").glob("*_log.out"))
    assert tables(run) == tables(run_experiment(toy(tmp_path / "whole", **options)).folder)


def test_cells_whose_job_was_killed_are_submitted_again(tmp_path: Path) -> None:
    options = {"seeds": [1], "seconds": 6.0}  # Slurm takes some seconds to kill a job
    run = run_of(tmp_path, **options)
    command = start({"output": str(tmp_path), **options}, on=f"slurm:partition={PARTITION},jobs=1,retries=1")
    wait_for(lambda: finished(run), "a cell")
    first = Jobs.read(run)
    assert first is not None
    assert first.run()
    subprocess.run(["scancel", "--full", "--signal=KILL", *first.arrays], check=True)

    assert command.wait() == 0
    second = Jobs.read(run)
    assert second is not None
    assert second.arrays != first.arrays
    wait_for(lambda: not queue(second.arrays[0]), "an empty queue")
    assert not second.run()
    assert tables(run) == tables(run_experiment(toy(tmp_path / "whole", **options)).folder)


def test_jobs_of_work_that_is_no_run_end_with_the_command(tmp_path: Path) -> None:
    check_that_work_apart_ends(f"slurm:partition={PARTITION},jobs=2", tmp_path)


def test_what_slurm_does_not_take_is_said(tmp_path: Path) -> None:
    with pytest.raises(VLPromptError, match=r"Slurm did not take the jobs: .*invalid partition"):
        run_experiment(toy(tmp_path), on="slurm:partition=nowhere")
