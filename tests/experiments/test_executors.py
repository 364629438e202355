"""Ray, Slurm's jobs and several commands on one folder: the very files of one process, also after kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.experiments.clusters import ENVIRONMENT, kill, lives, owners, ray_cluster, start, wait_for
from tests.experiments.toys import Toy, ToyConfig
from vlprompt.core.claims import Claims
from vlprompt.core.errors import CheckpointError, VLPromptError
from vlprompt.core.process_marks import ProcessMark
from vlprompt.experiments.apart import run_apart
from vlprompt.experiments.cell import CellResult, Failure
from vlprompt.experiments.cell_folder import CellFolder
from vlprompt.experiments.executors import create_executor
from vlprompt.experiments.folder import RunFolder
from vlprompt.experiments.jobs import Jobs
from vlprompt.experiments.runner import run_experiment

TABLES = ("metrics.json", "results.jsonl", "report.html", "table.md", "table.csv", "table.tex")


def toy(output: Path, **options: Any) -> Toy:
    return Toy(ToyConfig(task="toy", name="toy", output=str(output), **options))


def run_of(output: Path, **options: Any) -> Path:
    """Return the folder of a toy's run, whether it exists or not."""
    return RunFolder(toy(output, **options).config, {}).path


def tables(run: Path) -> dict[str, bytes]:
    return {name: (run / name).read_bytes() for name in TABLES}


def finished(run: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in run.glob("cells/*/cell.json")}


def check_that_work_apart_ends(on: str, folder: Path) -> None:
    """What is no run is not left to jobs whose folder goes with the command."""
    experiment = toy(folder, seeds=[1], seconds=6.0)
    answers = run_apart(on, experiment, experiment.cells(), folder / "own")
    assert isinstance(next(answers)[1], CellResult)
    (jobs,) = [jobs for own in (folder / "own").iterdir() if (jobs := Jobs.read(own))]
    assert jobs.run()

    with pytest.raises(KeyboardInterrupt):
        answers.throw(KeyboardInterrupt())
    wait_for(lambda: not jobs.run(), "the end of the jobs")
    assert not list((folder / "own").iterdir())


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    pytest.importorskip("ray")
    with ray_cluster() as address:
        yield address


# --- without any engine


@pytest.mark.parametrize(
    ("on", "package", "extra"), [("ray", "ray", "ray"), ("slurm:local", "submitit", "slurm")]
)
def test_an_engine_that_is_not_installed_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on: str, package: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(VLPromptError, match=rf"needs \w+: pip install 'vlprompt\[{extra}\]'\.$"):
        run_experiment(toy(tmp_path), on=on)
    assert not list(tmp_path.rglob("config.yaml"))


@pytest.mark.parametrize(
    ("on", "message"),
    [
        ("serial:2", "--on serial takes no number; got '2'"),
        ("processes:0", "a number of processes above 0; got '0'"),
        ("ray:cpus=none", "cpus"),
        ("slurm:jobs=0", "jobs"),
    ],
)
def test_what_builds_an_executor_refuses_its_argument(tmp_path: Path, on: str, message: str) -> None:
    with pytest.raises(VLPromptError, match=message):
        create_executor(on, toy(tmp_path))


def test_no_engine_is_imported_unless_it_is_asked_for() -> None:
    program = (
        "import sys\nfrom vlprompt.experiments.executors import EXECUTORS\nfrom vlprompt.experiments import runner\n"
        "print(EXECUTORS.names(), sorted({'ray', 'submitit', 'pyarrow'} & set(sys.modules)))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True
    )
    assert answer.stdout == "['processes', 'ray', 'serial', 'slurm'] []\n"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"on": "slurm:gpu"}, "--on slurm takes key=value, or the word local; got gpu"),
        ({"on": "ray:one,two"}, "--on ray takes one address; got one and two"),
        (
            {"on": "ray:auto,cores=2"},
            "cores= is for a cluster that is started here; the one at auto has its own",
        ),
        ({"attach": True}, "no command has left jobs of .* in a queue: there is nothing to attach to"),
        ({"join": True, "restart": True}, "give one of them"),
    ],
)
def test_mistakes_are_said_before_anything_is_written(
    tmp_path: Path, call: dict[str, Any], message: str
) -> None:
    with pytest.raises(VLPromptError, match=message):
        run_experiment(toy(tmp_path), **call)
    assert not list(tmp_path.rglob("config.yaml"))


def test_cells_that_another_process_has_are_left_to_it_and_its_results_are_taken(tmp_path: Path) -> None:
    """The claim of a process of another machine stands on one cell; nobody beats, so it is taken over in the end."""
    whole = run_experiment(toy(tmp_path / "whole")).folder
    run = run_of(tmp_path)
    place = run / "cells" / "one_a_seed1"
    claim = Claims(place).take()
    assert claim is not None

    with (
        RunFolder(toy(tmp_path).config, {}).held(),
        pytest.raises(CheckpointError, match=r"is being written by process \d+ on .*add --join"),
    ):
        run_experiment(toy(tmp_path))

    second = start({"output": str(tmp_path)}, join=True)
    wait_for(lambda: len(finished(run)) == 6, "all cells but two")
    assert not (place / "cell.json").exists()
    (place / "cell.json").write_bytes((whole / "cells" / "one_a_seed1" / "cell.json").read_bytes())
    claim.release()
    assert second.wait() == 0
    assert tables(run) == tables(whole)


# --- several commands on one folder


@pytest.mark.slow
def test_commands_that_joined_share_the_cells_and_each_writes_the_whole(tmp_path: Path) -> None:
    options = {"seconds": 0.3, "diary": str(tmp_path / "diary")}
    commands = [start({"output": str(tmp_path), **options}, join=True) for _ in range(2)]
    assert [command.wait() for command in commands] == [0, 0]

    attempts = [line.split() for line in (tmp_path / "diary").read_text().splitlines()]
    assert sorted(name for name, _ in attempts) == sorted(cell.name for cell in toy(tmp_path).cells())
    assert len({process for _, process in attempts}) == 2
    whole = run_experiment(toy(tmp_path / "whole", **options)).folder
    assert tables(run_of(tmp_path, **options)) == tables(whole)


# --- jobs, as processes of this machine


@pytest.mark.slow
def test_jobs_give_the_files_of_one_process_though_one_is_killed_and_a_cell_fails(tmp_path: Path) -> None:
    options = {"seeds": [1], "fail": ["two_b_seed1"], "kill": ["one_a_seed1"], "kill_once": str(tmp_path)}
    outcome = run_experiment(toy(tmp_path, **options), on="slurm:local,jobs=1")
    assert outcome.failures == ["two_b_seed1: two_b_seed1 can't be read."]
    logs = {path.parent.name: path.read_text() for path in outcome.folder.glob("cells/*/log.txt")}
    assert logs == {"two_b_seed1": "two_b_seed1 speaks\n"}

    whole = run_experiment(toy(tmp_path / "whole", **options)).folder
    assert tables(outcome.folder) == tables(whole)


@pytest.mark.slow
def test_a_job_that_is_preempted_is_queued_again_and_goes_on(tmp_path: Path) -> None:
    options = {"methods": {"one": 0.1}, "seeds": [1], "seconds": 4.0, "diary": str(tmp_path / "diary")}
    run = run_of(tmp_path, **options)
    command = start({"output": str(tmp_path), **options}, on="slurm:local,jobs=1,retries=0")
    wait_for((tmp_path / "diary").exists, "a cell that has begun")
    ((cell, process),) = wait_for(lambda: owners(run).items(), "a job")
    os.kill(process, signal.SIGUSR2)  # what Slurm sends before it takes a job off its node
    assert command.wait() == 0

    attempts = [line.split() for line in (tmp_path / "diary").read_text().splitlines()]
    assert [name for name, _ in attempts].count(cell) == 2
    assert len({process for _, process in attempts}) == 2
    assert len(json.loads((run / "jobs" / "jobs.json").read_text())["names"]) == 1


@pytest.mark.slow
def test_jobs_go_on_when_the_command_is_killed_and_another_one_collects(tmp_path: Path) -> None:
    options = {"seconds": 0.5}
    run = run_of(tmp_path, **options)
    command = start({"output": str(tmp_path), **options}, on="slurm:local,jobs=2")
    wait_for(lambda: finished(run), "a cell")
    kill(command.pid)
    command.wait()
    assert not (run / "results.jsonl").exists()

    collected = run_experiment(toy(tmp_path, **options), attach=True)
    assert collected.exit_code == 0
    assert tables(run) == tables(run_experiment(toy(tmp_path / "whole", **options)).folder)
    with pytest.raises(VLPromptError, match="nothing to attach to"):
        run_experiment(toy(tmp_path, seconds=0.1), attach=True)


def test_attach_starts_nothing_anywhere(tmp_path: Path) -> None:
    with pytest.raises(VLPromptError, match="leave out --on processes:2"):
        run_experiment(toy(tmp_path), on="processes:2", attach=True)


def jobs_of_a_cluster(run: Path) -> None:
    Jobs("slurm:", ("7_0",)).write(run)


def test_jobs_of_a_cluster_are_waited_for_where_somebody_can_see_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("submitit")
    jobs_of_a_cluster(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    experiment = toy(tmp_path)
    refusal = pytest.raises(VLPromptError, match=r"this machine has no squeue.*delete .*jobs\.json")
    with create_executor("slurm:", experiment, attach=True) as executor, refusal:
        executor.begin(tmp_path, experiment.cells())


@pytest.mark.slow
def test_an_error_while_jobs_are_watched_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    jobs_of_a_cluster(tmp_path)
    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\necho 7_0\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    experiment = toy(tmp_path)
    cells = experiment.cells()
    place = CellFolder.of(tmp_path, cells[0])
    place.path.mkdir(parents=True)
    (place.path / "cell.json").write_text("[" * 200_000)  # which no reader of JSON can end
    with create_executor("slurm:", experiment, attach=True) as executor:
        executor.begin(tmp_path, cells)
        first = executor.submit(place).result(60)
        assert isinstance(first, Failure)
        assert "recursion" in first.message
        assert executor.submit(CellFolder.of(tmp_path, cells[1])).result(1) == first


def test_jobs_of_a_machine_that_was_started_again_are_gone() -> None:
    here = ProcessMark.here()
    assert here.may_run()
    assert not replace(here, machine="before/the/start").may_run()
    elsewhere = replace(here, machine="another/machine", host="another")
    assert elsewhere.may_run()
    assert Jobs("slurm:local", ("1",), (elsewhere,)).foreign_hosts() == ["another"]
    assert not Jobs("slurm:local", ("1",), (replace(here, machine="before"),)).run()


@pytest.mark.slow
def test_jobs_of_work_that_is_no_run_end_with_the_command(tmp_path: Path) -> None:
    check_that_work_apart_ends("slurm:local,jobs=2", tmp_path)


# --- Ray, two nodes


@pytest.mark.slow
def test_ray_gives_the_files_of_one_process_though_a_worker_is_killed_and_a_cell_fails(
    tmp_path: Path, cluster: str
) -> None:
    options = {"seeds": [1], "fail": ["two_b_seed1"], "kill": ["one_a_seed1"], "kill_once": str(tmp_path)}
    outcome = run_experiment(toy(tmp_path, **options), on=f"ray:{cluster}")
    assert outcome.failures == ["two_b_seed1: two_b_seed1 can't be read."]
    logs = {path.parent.name: path.read_text() for path in outcome.folder.glob("cells/*/log.txt")}
    assert logs == {"two_b_seed1": "two_b_seed1 speaks\n"}

    whole = run_experiment(toy(tmp_path / "whole", **options)).folder
    assert tables(outcome.folder) == tables(whole)


@pytest.mark.slow
def test_a_cell_that_kills_each_of_its_workers_fails_and_says_where_its_log_is(
    tmp_path: Path, cluster: str
) -> None:
    options = {"methods": {"one": 0.1}, "data": ["a"], "kill": ["one_a_seed1"]}
    outcome = run_experiment(toy(tmp_path, **options), on=f"ray:{cluster},retries=0")
    log = outcome.folder / "cells" / "one_a_seed1" / "log.txt"
    assert outcome.failures == [
        f"one_a_seed1: the Ray worker that ran it was killed or crashed, once. Its log: {log}."
    ]
    assert log.read_text() == "one_a_seed1 speaks\n"
    assert json.loads((log.parent / "failure.json").read_text())["message"] in outcome.failures[0]


@pytest.mark.slow
def test_ray_ends_cells_with_their_command_and_the_next_command_goes_on(tmp_path: Path, cluster: str) -> None:
    # Cells wait for these files to go, so that some are left when a command is stopped, however slow the machine.
    first, second = tmp_path / "first", tmp_path / "second"
    waiting = dict.fromkeys(("one_b_seed1", "one_b_seed2", "two_a_seed1", "two_a_seed2"), str(first))
    options = {"held": {**waiting, "two_b_seed1": str(second), "two_b_seed2": str(second)}}
    first.touch()
    second.touch()
    run = run_of(tmp_path, **options)

    def end_one(way: signal.Signals, cells: int) -> int:
        command = start({"output": str(tmp_path), **options}, on=f"ray:{cluster}")
        wait_for(lambda: len(finished(run)) >= cells, f"{cells} cells")
        workers = wait_for(lambda: owners(run).values(), "the next cell")
        command.send_signal(way)
        status = command.wait(timeout=120)
        wait_for(lambda: not any(lives(process) for process in workers), "the end of the workers")
        return status

    assert end_one(signal.SIGINT, 1) == 130
    first.unlink()
    assert end_one(signal.SIGKILL, len(finished(run)) + 1) == -signal.SIGKILL
    kept = finished(run)
    assert 2 <= len(kept) <= 6
    second.unlink()
    assert run_experiment(toy(tmp_path, **options), on=f"ray:{cluster}").exit_code == 0
    assert kept.items() <= finished(run).items()
    assert tables(run) == tables(run_experiment(toy(tmp_path / "whole", **options)).folder)
