"""What an experiment says beforehand that a run will have."""

from __future__ import annotations

import json
from pathlib import Path

from vlprompt.experiments.tasks import read_experiment

__all__ = ["check_foretold"]


def check_foretold(folder: Path) -> None:
    """Assert that a finished run has every figure that its configuration foretells."""
    figures = read_experiment(folder / "config.yaml").figures()
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    missing = [key for key in figures if key not in metrics]
    assert figures
    assert not missing, missing
