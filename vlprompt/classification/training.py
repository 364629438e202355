"""What training took: learned numbers and seconds of every learner, beside the tables of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlprompt.core.files import write_json, write_text
from vlprompt.experiments.cell import Cell
from vlprompt.experiments.cell_folder import CellFolder
from vlprompt.experiments.layout import label
from vlprompt.experiments.results import Results
from vlprompt.experiments.statistics import summarise

__all__ = ["write"]

_ROW = ("setting", "method", "shots")
_SECONDS = "training"  # among a cell's timings


def write(results: Results, cells: Sequence[Cell], folder: Path) -> None:
    """Write ``timings.json`` and ``timings.md``: a row for each learner and number of shots that was trained.

    Numbers that are found by gradients or in closed form count alike. A learner whose parameters belong to classes has
    more of them for more classes, so they are written as a range. Seconds are means over the cells.

    Args:
        results: The long table.
        cells: All cells of the run.
        folder: The run's.
    """
    counts = results.select("trainable", part="train")
    rows: dict[str, dict[str, list[float]]] = {}
    for cell in cells:
        seconds = CellFolder.of(folder, cell).timings().get(_SECONDS)
        if seconds is None:
            continue
        row = rows.setdefault(
            label(_ROW, tuple(cell.get(name) for name in _ROW)), {"seconds": [], "trainable": []}
        )
        row["seconds"].append(seconds)
        row["trainable"] += counts.select(**cell.where).values()

    if not rows:
        return

    write_json(folder / "timings.json", rows)
    lines = ["| learner | learned numbers | seconds of training |", "|---|---:|---:|"]
    for name, row in rows.items():
        lines.append(f"| {name} | {_range(row['trainable'])} | {summarise(row['seconds']).mean:.1f} |")
    write_text(folder / "timings.md", "\n".join(lines) + "\n")


def _range(counts: Sequence[float]) -> str:
    """Return the least and the largest count; empty if none is known."""
    different = sorted({int(count) for count in counts})
    return " to ".join(f"{count:,}" for count in dict.fromkeys((*different[:1], *different[-1:])))
