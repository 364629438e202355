"""Packs of cells: all of them once, of about the same length, and what others need first."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from tests.experiments.toys import Toy, ToyConfig
from vlprompt.core.engine_options import read_options
from vlprompt.core.errors import ConfigError
from vlprompt.core.ray_cluster import RayOptions
from vlprompt.experiments.cell import Cell
from vlprompt.experiments.executors.slurm import SlurmOptions
from vlprompt.experiments.packing import expected_costs, pack
from vlprompt.experiments.runner import run_experiment


def cells_of(costs: list[float]) -> dict[Cell, float]:
    return {Cell.at(seed=number): cost for number, cost in enumerate(costs)}


@pytest.mark.parametrize("costs", [[1, 1, 2, 3, 5, 8], [7, 1, 1, 1, 1, 1, 1, 1], [3, 3, 2, 2, 2], [1]])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_longest_pack_is_near_the_best_of_all_divisions(costs: list[float], count: int) -> None:
    packs = pack(cells_of(costs), count)
    assert sorted(cell["seed"] for cells in packs for cell in cells) == list(range(len(costs)))
    assert all(packs)
    assert len(packs) == min(count, len(costs))
    assert all([cell["seed"] for cell in cells] == sorted(cell["seed"] for cell in cells) for cells in packs)

    def longest(division: tuple[int, ...]) -> float:
        return max(
            sum(c for c, owner in zip(costs, division, strict=True) if owner == o) for o in range(count)
        )

    best = min(longest(division) for division in itertools.product(range(count), repeat=len(costs)))
    assert max(sum(costs[cell["seed"]] for cell in cells) for cells in packs) <= 4 / 3 * best


def test_what_siblings_took_is_known_better_than_guesses(tmp_path: Path) -> None:
    experiment = Toy(ToyConfig(task="toy", name="toy", output=str(tmp_path), seeds=[1, 2, 3]))
    cells = experiment.cells()
    assert set(expected_costs(experiment, tmp_path, cells).values()) == {1.0}

    run = run_experiment(experiment).folder
    for cell in cells:
        seconds = {1: 10.0, 2: 30.0}.get(cell["seed"]) if cell["method"] == "one" else None
        path = run / "cells" / cell.name / "timings.json"
        path.unlink() if seconds is None else path.write_text(json.dumps({"training": seconds}))
    costs = expected_costs(experiment, run, [cell for cell in cells if cell["seed"] == 3])
    assert {cost for cell, cost in costs.items() if cell["method"] == "one"} == {20.0}
    assert {cost for cell, cost in costs.items() if cell["method"] == "two"} == {20.0}  # the mean of all


def test_options_have_units() -> None:
    words, slurm = read_options("slurm", "partition=gpu, gpus=1,time=4h,memory=512MiB", SlurmOptions)
    assert (words, slurm.partition, slurm.gpus, slurm.time, slurm.memory) == ([], "gpu", 1, 240.0, 0.5)
    words, ray = read_options("ray", "ray://head:10001,gpus=0.5,memory=2g", RayOptions)
    assert (words, ray.gpus, ray.memory, ray.cpus) == (["ray://head:10001"], 0.5, 2.0, 1.0)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("partion=gpu", r"partion: unknown key; did you mean 'partition'\?"),
        ("time=soon", r"time: 'soon' is no number with a unit, for example 4h, 90m or 2d\."),
        ("memory=4XB", r"memory: '4XB' is no number with a unit, for example 16GiB or 512MiB\."),
        ("gpus=-1", r"gpus: input should be greater than or equal to 0, got '-1'\."),
        ("gpus=1,gpus=2", r"gpus: given twice, '1' and '2'\."),
    ],
)
def test_mistakes_name_the_option(argument: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        read_options("slurm", argument, SlurmOptions)
    assert f"--on slurm:{argument}" in str(raised.value)
