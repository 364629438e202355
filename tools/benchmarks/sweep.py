"""Cells per hour of a sweep: one process against one and two workers of each executor."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from benchmarks import BENCHMARKS
from benchmarks.machine import NoiseWatch
from vlprompt.core.errors import VLPromptError
from vlprompt.experiments.runner import run_experiment
from vlprompt.experiments.tasks import read_experiment

__all__ = ["bench_sweep"]

_SPECS = {
    "processes": "processes:{workers}",
    "ray": "ray:cores={workers}",
    "slurm": "slurm:local,jobs={workers}",
}
_WORKERS = (1, 2)


@BENCHMARKS.register(
    "sweep", summary="cells per hour of a few-shot sweep, in one process and on 1 and 2 workers"
)
def bench_sweep(
    *,
    executor: Literal["processes", "ray", "slurm"] = "processes",
    cells: Annotated[int, Field(ge=2)] = 12,
    epochs: Annotated[int, Field(ge=1)] = 400,
) -> dict[str, Any]:
    """Run CoOp with as many seeds as cells, on the embedded defaults, in the same way each time.

    A whole run is timed: the start of the workers, the cells, the tables and the report. Efficiency is cells per hour
    beside so many times those of the serial run. Where other work runs on the machine, two workers get two shares of
    it, so the clock flatters them; ``cpu_efficiency``, the processor time of the serial run beside that of the workers,
    does not. It counts processes that belong to this one: all of ``processes``, not those of Ray.

    Args:
        executor: ``slurm`` is submitit's local executor.
        cells: Seeds.
        epochs: Of each cell; it decides how long one takes.
    """
    serial = _timed("serial", cells, epochs)
    rows = {}
    for workers in _WORKERS:
        row = _timed(_SPECS[executor].format(workers=workers), cells, epochs)
        rows[str(workers)] = {
            **row,
            "efficiency": row["cells_per_hour"] / (workers * serial["cells_per_hour"]),
            "cpu_efficiency": serial["cpu_seconds"] / row["cpu_seconds"],
        }
    return {"executor": executor, "cells": cells, "epochs": epochs, "serial": serial, "workers": rows}


def _timed(on: str, cells: int, epochs: int) -> dict[str, Any]:
    """Return the figures of one run."""
    with _configuration(cells, epochs) as path:
        watch = NoiseWatch()
        before = os.times()
        begin = time.perf_counter()
        first: list[float] = []

        def note(name: str, done: int, total: int) -> None:
            if done and not first:
                first.append(time.perf_counter() - begin)

        outcome = run_experiment(read_experiment(path), on=on, progress=note)
        seconds = time.perf_counter() - begin
        noise = watch.noise()
        after = os.times()

    if outcome.failures:
        raise VLPromptError(f"the run on {on} failed: {outcome.failures[0]}")
    spent = sum(after[:4]) - sum(before[:4])  # user and system time, of this process and its children
    return {
        "seconds": seconds,
        "cpu_seconds": spent,
        "first_cell_seconds": first[0],
        "cells_per_hour": 3600 * cells / seconds,
        "busy_with_others": None if noise is None else noise.others,
    }


@contextmanager
def _configuration(cells: int, epochs: int) -> Iterator[str]:
    """Yield the path of a configuration whose run lies in a folder that is removed afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        content = {
            "name": "sweep",
            "output": f"{folder}/runs",
            "task": "classification",
            "learner": {"name": "coop"},
            "data": {"name": "scenes/kind"},
            "protocol": {"shots": [4], "seeds": list(range(1, cells + 1))},
            "train": {"epochs": epochs},
        }
        path = Path(folder, "sweep.yaml")
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        yield str(path)
