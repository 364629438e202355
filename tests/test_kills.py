"""Kill campaign: every kind of experiment, killed at random moments, ends with the files of an uninterrupted run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
KILLS = 8
SAME = ("metrics.json", "results.jsonl", "report.html", "table.md")

_OFTEN = {"checkpoint_seconds": 0}
_SEGMENTATION = {
    "task": "segmentation",
    "backbone": {"name": "tiny"},
    "models": {"clipseg": {}},
    "methods": {"zero_shot": {}, "vpt": {"depth": 2}},
    "data": {"name": "scenes/masks@sketch", "val_images": 4, "options": {"size": 32}},
}
KINDS: dict[str, dict[str, Any]] = {
    "few shots": {
        "task": "classification",
        "methods": {"coop": {}, "linear_probe": {}},
        "data": {"name": "scenes/kind"},
        "protocol": {"shots": [1, 2], "seeds": [1, 2]},
        "train": {"epochs": 60, "optimizer": "adamw", "select": "best", **_OFTEN},
    },
    "short cells": {
        "task": "classification",
        "learner": {"name": "coop"},
        "data": {"name": "scenes/kind", "cache_dir": "features"},
        "protocol": {"shots": [1, 2], "seeds": [1, 2, 3, 4]},
        "train": {"epochs": 3, **_OFTEN},
    },
    "multitask": {
        "task": "classification",
        "learner": {"name": "mvlpt"},
        "data": {"name": ["scenes/kind", "scenes/larger"]},
        "protocol": {"name": "multitask", "shots": [2], "seeds": [1]},
        "target": {"names": ["scenes/relation"], "shots": [1]},
        "train": {"epochs": 40, **_OFTEN},
    },
    "adaptation": {
        "task": "adaptation",
        "backbone": {"name": "tiny"},
        "data": {
            "name": ["scenes/size@sketch", "scenes/size@night"],
            "split": "val",
            "test_images": 30,
            "batch_size": 1,
        },
        "methods": {"mta": {"views": 8}, "tpt": {"views": 8}, "tda": {}},
        "protocol": {"seeds": [1, 2]},
    },
    "segmentation": {
        **_SEGMENTATION,
        "protocol": {"name": "benchmark", "images": 4, "seeds": [1, 2]},
        "train": {"epochs": 12, "batch_size": 4, **_OFTEN},
    },
    "search": {
        **_SEGMENTATION,
        "protocol": {"name": "search", "images": 4, "seeds": [1]},
        "train": {"epochs": 2, "batch_size": 4, **_OFTEN},
        "search": {"trials": 6, "startup": 2, "space": {"train.lr": {"low": 0.01, "high": 0.1, "log": True}}},
    },
    "detection": {
        "task": "detection",
        "detector": {"name": "owl-tiny"},
        "data": {"name": "scenes/shape_colour"},
        "concepts": {"init": "text", "length": 1},
        "protocol": {"images": [2, 4], "seeds": [1, 2]},
        "train": {"epochs": 6, "batch_size": 2, "optimizer": "adamw", **_OFTEN},
    },
    "generation": {
        "task": "generation",
        "host": {"kind": "tiny-diffusion", "steps": 2, "guidance": 1},
        "data": {"concepts": 1, "split": "val", "images": 2, "held_out": 2},
        "methods": {
            "textual-inversion": {"template": "a photo of a *."},
            "cones": {"mode": "full", "template": "a photo of a *."},
        },
        "protocol": {"seeds": [1, 2], "baseline": "textual-inversion"},
        "train": {"epochs": 6, "batch_size": 2, "optimizer": "adamw", "eval_every": 2, **_OFTEN},
        "samples": 2,
    },
    "security": {
        "task": "security",
        "data": {"name": "digits"},
        "methods": {"dbom": {"train": {"epochs": 3}}, "spectral": {}, "zero_shot": {}},
        "suspect": {"epochs": 1},
        "protocol": {"seeds": [1]},
    },
}

_PROGRAM = """
import sys
from vlprompt.experiments.runner import run_experiment
from vlprompt.experiments.tasks import read_experiment
outcome = run_experiment(read_experiment("run.yaml"), on=sys.argv[1])
sys.exit(1 if outcome.failures else 0)
"""


@pytest.mark.campaign
@pytest.mark.parametrize("on", ["serial", "processes:2"])
@pytest.mark.parametrize("kind", KINDS)
def test_kills_at_random_moments_change_no_file(kind: str, on: str, tmp_path: Path) -> None:
    """The uninterrupted run is serial; the other one has the executor ``on`` and is killed ``KILLS`` times."""
    if on != "serial" and kind not in ("few shots", "adaptation", "segmentation"):
        pytest.skip("one executor is enough for the other kinds")

    begin = time.monotonic()
    assert start_run(tmp_path / "whole", kind, "serial").wait() == 0
    duration = time.monotonic() - begin

    moments = random.Random(f"{kind} {on}")
    kills = 0
    rounds = 0
    while kills < KILLS:
        folder = tmp_path / f"killed{rounds}"
        rounds += 1
        code: int | None = None
        while code is None:
            # Often shorter than what is left, so that a run is killed several times before it ends.
            limit = moments.uniform(0.2, 0.8) * duration if kills < KILLS else None
            code = _run_for(folder, kind, on, limit)
            kills += code is None
        assert code == 0
        _compare(tmp_path / "whole", folder)
    print(f"{kind} on {on}: {kills} kills, {rounds} runs, {duration:.1f} s uninterrupted")


def _run_for(folder: Path, kind: str, on: str, seconds: float | None) -> int | None:
    """Run until the end or for some seconds; return the exit status, None if it was killed."""
    running = start_run(folder, kind, on)
    try:
        return running.wait(seconds)
    except subprocess.TimeoutExpired:
        # The process alone, not its group: workers must end by themselves when the process that started them is gone.
        running.send_signal(signal.SIGKILL)
        running.wait()
        return None


def start_run(
    folder: Path, kind: str, on: str, environment: dict[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a run of a kind in a folder, or go on with one; it gives back its exit status."""
    folder.mkdir(exist_ok=True)
    (folder / "run.yaml").write_text(yaml.safe_dump({**KINDS[kind], "name": "killed", "output": "runs"}))
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(environment or {})}
    return subprocess.Popen([sys.executable, "-c", _PROGRAM, on], cwd=folder, env=variables)


def _compare(whole: Path, killed: Path) -> None:
    for name in SAME:
        (expected,) = whole.glob(f"runs/*/*/{name}")
        (actual,) = killed.glob(f"runs/*/*/{name}")
        assert actual.read_bytes() == expected.read_bytes(), name
