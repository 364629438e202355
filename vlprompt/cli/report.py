"""``vlprompt report``: the tables of finished runs, side by side."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["command"]


class Format(str, Enum):
    """How tables are written."""

    MARKDOWN = "markdown"
    CSV = "csv"
    LATEX = "latex"


def command(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, for example runs/coop_tiny/*.")],
    format: Annotated[Format, typer.Option(help="How tables are written.")] = Format.MARKDOWN,
) -> None:
    """Print the tables of finished runs; several runs of one kind share a table."""
    from vlprompt.experiments.side_by_side import tables_of_runs

    for number, table in enumerate(tables_of_runs(runs)):
        if number:
            print()
        if format is Format.CSV:
            print(table.csv(), end="")
        elif format is Format.LATEX:
            print(table.latex(), end="")
        else:
            print(table.markdown(), end="")
