"""Small runs of segmentation experiments for tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from vlprompt.experiments.experiment import Experiment
from vlprompt.experiments.runner import RunOutcome, run_experiment
from vlprompt.experiments.tasks import read_experiment

SKETCH = "scenes/masks@sketch"
SMALL_MODEL = {"name": "clipseg", "weights": "random", "reduce": 8, "hidden": 16}
BENCHMARK: dict[str, Any] = {
    "task": "segmentation",
    "name": "small",
    "backbone": {"name": "tiny"},
    "models": {"small": SMALL_MODEL},
    "methods": {"zero_shot": {}, "vpt": {"train": {"lr": 0.05}}},
    "data": {"name": [SKETCH], "val_images": 3, "test_images": 6},
    "protocol": {"name": "benchmark", "images": 4, "seeds": [1, 2]},
    "train": {"epochs": 2, "batch_size": 4},
    "overlays": 2,
}


def write_config(folder: Path, content: Mapping[str, Any], name: str = "small") -> Path:
    """Write a configuration whose runs lie in ``folder/runs``."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**content, "output": str(folder / "runs")}))
    return path


def read(cfg: Path, *overrides: str) -> Experiment:
    """Return the experiment of a file."""
    return read_experiment(cfg, list(overrides))


def run(cfg: Path, *overrides: str, on: str = "serial") -> RunOutcome:
    """Run a file."""
    return run_experiment(read(cfg, *overrides), on=on)
