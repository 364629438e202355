"""Write docs/notebooks: tutorials as notebooks, without outputs: ``python docs/notebooks.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jupytext
import nbformat

TUTORIALS = Path(__file__).parent / "tutorials"
FOLDER = Path(__file__).parent / "notebooks"
NAMES = ("own-images", "no-gpu", "compare", "test-time")
"""Tutorials that take seconds and need nothing but the package."""

KERNEL = """---
jupyter:
  kernelspec: {display_name: Python 3, language: python, name: python3}
---
"""
INTRODUCTION = """This notebook is the tutorial [{name}](../tutorials/{name}.md); `python docs/notebooks.py` makes it.
It needs `pip install vlprompt`, and writes into the folder that it runs in."""


def notebook(name: str) -> str:
    """Return a tutorial as a notebook: Python blocks are cells, sh blocks are cells that a shell runs."""
    text = (TUTORIALS / f"{name}.md").read_text(encoding="utf-8")
    content: Any = jupytext.reads(KERNEL + text.replace("```sh\n", "```bash\n"), "md")

    for cell in content.cells:
        cell.source = cell.source.replace("%%bash\n", "%%bash -e\n", 1)
    content.cells.insert(1, nbformat.v4.new_markdown_cell(INTRODUCTION.format(name=name)))
    for number, cell in enumerate(content.cells):
        cell.id = f"{name}-{number}"  # ids are random otherwise
        cell.metadata = {}

    content.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    content.nbformat_minor = 5
    nbformat.validate(content)
    return str(nbformat.writes(content)) + "\n"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in NAMES:
        (FOLDER / f"{name}.ipynb").write_text(notebook(name), encoding="utf-8")
