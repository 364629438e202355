"""A small task as a plug-in."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Name of a configuration of the task ``toy``, which is installed as a plug-in."""
    installed = tmp_path / "plug-in" / "toys-1.0.dist-info"  # what pip writes for an entry point
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: toys\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("[vlprompt.tasks]\ntoy = tests.experiments.toys:build\n")
    monkeypatch.syspath_prepend(str(tmp_path / "plug-in"))
    (tmp_path / "toy.yaml").write_text("# A toy.\ntask: toy\nname: toy\n")
    return "toy.yaml"
