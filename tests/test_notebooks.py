"""The notebooks are the tutorials, hold no outputs, and run from the first cell to the last."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("jupytext")

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def converter() -> ModuleType:
    """The script that makes the notebooks."""
    spec = importlib.util.spec_from_file_location("notebooks", ROOT / "docs" / "notebooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_is_one_for_each_of_the_four_tutorials_and_no_other() -> None:
    assert sorted(converter().NAMES) == [path.stem for path in NOTEBOOKS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_its_tutorial_without_outputs(path: Path) -> None:
    """`python docs/notebooks.py` brings them up to date."""
    content = nbformat.read(path, as_version=4)
    made = nbformat.reads(converter().notebook(path.stem), as_version=4)
    assert [(cell.cell_type, cell.source) for cell in content.cells] == [
        (cell.cell_type, cell.source) for cell in made.cells
    ]
    for cell in content.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None

    # Every block of the tutorial is a cell, as it is written there.
    tutorial = (ROOT / "docs" / "tutorials" / f"{path.stem}.md").read_text(encoding="utf-8")
    blocks = [cell.source.removeprefix("%%bash -e\n") for cell in content.cells if cell.cell_type == "code"]
    assert len(blocks) == tutorial.count("```") // 2
    for block in blocks:
        assert f"\n{block.rstrip()}\n```" in tutorial


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")

    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "vlprompt").write_text(f'#!/bin/sh\nexec {sys.executable} -m vlprompt "$@"\n')
    (commands / "vlprompt").chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    folder = tmp_path / "work"
    for needed in (folder, tmp_path / "home"):
        needed.mkdir()
    content = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        content, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute()  # raises at the first cell that fails
    assert client.code_cells_executed == sum(cell.cell_type == "code" for cell in content.cells)
