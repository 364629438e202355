"""Kill campaign over executors: commands and workers, killed at random moments, change no byte of a table."""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.experiments.clusters import ENVIRONMENT, kill, lives, owners, ray_cluster
from tests.test_kills import start_run

KILLS = 20
KIND = "short cells"  # what is killed is the engine: most moments should fall between cells, or into their starts
SAME = ("metrics.json", "results.jsonl", "report.html", "table.md", "table.csv", "table.tex")
EXECUTORS = ("serial", "processes:2", "ray", "slurm:local,jobs=2,retries=100")


@contextmanager
def place_for(on: str) -> Iterator[str]:
    """Yield what to pass to ``--on``, with a Ray cluster of two nodes where that is asked for."""
    if on == "ray":
        pytest.importorskip("ray")
        with ray_cluster() as address:
            yield f"ray:{address},retries=100"
    else:
        yield on


@pytest.mark.campaign
@pytest.mark.parametrize("on", EXECUTORS)
def test_kills_of_commands_and_workers_change_no_table(on: str, tmp_path: Path) -> None:
    """The first run is serial and uninterrupted; the second has the executor; the others are killed ``KILLS`` times."""
    assert run_on(tmp_path / "whole", "serial").wait() == 0
    moments = random.Random(on)
    kills = {"commands": 0, "workers": 0}
    rounds = 0

    with place_for(on) as spec:
        begin = time.monotonic()
        assert run_on(tmp_path / "calm", spec).wait() == 0
        duration = time.monotonic() - begin
        assert tables(tmp_path / "calm") == tables(tmp_path / "whole")

        while sum(kills.values()) < KILLS:
            folder = tmp_path / f"killed{rounds}"
            rounds += 1
            while torment(folder, spec, moments, duration, kills) != 0:
                pass
            assert tables(folder) == tables(tmp_path / "whole")

    print(f"{on}: {kills}, {rounds} runs, {duration:.1f} s uninterrupted")


def torment(
    folder: Path, on: str, moments: random.Random, duration: float, kills: dict[str, int]
) -> int | None:
    """Run a command to its end, and kill its workers or itself; return its exit status, None if it was killed."""
    command = run_on(folder, on)
    while True:
        limit = moments.uniform(0.2, 0.9) * duration if sum(kills.values()) < KILLS else None
        try:
            return command.wait(limit)
        except subprocess.TimeoutExpired:
            pass

        processes = {process for run in folder.glob("runs/*/*") for process in owners(run).values()}
        workers = sorted(process for process in processes - {command.pid} if lives(process))
        if workers and moments.random() < 0.5:
            kill(moments.choice(workers))
            kills["workers"] += 1
        else:
            kill(command.pid)
            command.wait()
            kills["commands"] += 1
            return None


def run_on(folder: Path, on: str) -> subprocess.Popen[bytes]:
    return start_run(folder, KIND, on, {**os.environ, **ENVIRONMENT})


def tables(folder: Path) -> dict[str, bytes]:
    return {name: path.read_bytes() for name in SAME for path in folder.glob(f"runs/*/*/{name}")}
