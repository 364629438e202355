"""Finished runs in one table: their long tables are joined, and the rows tell the runs apart where they must."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from vlprompt.core.errors import CheckpointError
from vlprompt.core.paths import user_path
from vlprompt.experiments.cell import Coordinate
from vlprompt.experiments.config import ASIDE
from vlprompt.experiments.experiment import Experiment
from vlprompt.experiments.layout import Layout
from vlprompt.experiments.results import Line, Results
from vlprompt.experiments.tables import Table
from vlprompt.experiments.tasks import read_experiment

__all__ = ["tables_of_runs"]


@dataclass(frozen=True)
class _Run:
    """A finished run, read back."""

    folder: Path
    experiment: Experiment
    results: Results


def tables_of_runs(folders: Sequence[str | Path]) -> list[Table]:
    """Return the tables of finished runs.

    One run has its own tables. Runs whose results are laid out alike (the same task and protocol) share tables: a row
    for each method, and where two runs measured the same method in the same place, a row for each of them with the
    run's name behind the method's. Lines that are equal in all runs, such as a common baseline's, are shown once.

    Args:
        folders: Of runs, each with ``config.yaml`` and ``results.jsonl``.

    Raises:
        CheckpointError: If a folder holds no run, or one without results.
        DataError: If a file of results is damaged.
        ConfigError: If a configuration is not one of this version.
    """
    groups: dict[tuple[object, ...], list[_Run]] = {}
    for folder in dict.fromkeys(user_path(folder) for folder in folders):
        run = _read(folder)
        groups.setdefault(_kind(run), []).append(run)

    tables: list[Table] = []
    for runs in groups.values():
        tables += runs[0].experiment.tables(_joined(runs))
    return tables


def _read(folder: Path) -> _Run:
    for name in ("config.yaml", "results.jsonl"):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder} is not the folder of a finished run: it has no {name}. Such folders are called "
                "<output>/<name>/<id>, for example runs/coop_tiny/0a1b2c3d."
            )
    experiment = read_experiment(folder / "config.yaml")
    return _Run(folder, experiment, Results.read(folder / "results.jsonl"))


def _kind(run: _Run) -> tuple[object, ...]:
    """Return what runs must have in common to share tables."""
    layout = run.experiment.layout()
    shape = (layout.metric, layout.rows, layout.columns, layout.tables)
    return (type(run.experiment), run.experiment.facts().get("protocol"), *shape)


def _joined(runs: Sequence[_Run]) -> Results:
    """Return the lines of all runs, with labels that tell apart what the same place holds twice."""
    if len(runs) == 1:
        return runs[0].results
    label = _label_coordinate(runs[0].experiment.layout())
    ambiguous = _ambiguous(runs, label)
    names = _names(runs)

    lines: dict[tuple[object, ...], Line] = {}
    for run, name in zip(runs, names, strict=True):
        for line in run.results.lines:
            method = line.where.get(label)
            if method in ambiguous:
                line = replace(line, where={**line.where, label: f"{method} ({name})"})
            lines.setdefault(_place(line), line)  # equal lines of several runs count once
    return Results(lines.values())


def _label_coordinate(layout: Layout) -> str:
    """Return the coordinate that names a row first."""
    return layout.rows[0] if layout.rows else "method"


def _ambiguous(runs: Sequence[_Run], label: str) -> set[Coordinate]:
    """Return the row labels that don't mean the same in all runs.

    A label means the same in two runs if what both measured in the same place is equal. Where they have no place in
    common (other data, other seeds), it does if the runs differ in data and protocol only.
    """
    ambiguous: set[Coordinate] = set()
    for first, second in combinations(runs, 2):
        alike = _settings(first) == _settings(second)
        for name in first.results.coordinates(label):
            ours = _values(first, label, name)
            theirs = _values(second, label, name)
            common = ours.keys() & theirs.keys()
            differs = any(ours[key] != theirs[key] for key in common)
            if theirs and (differs or not (common or alike)):
                ambiguous.add(name)
    return ambiguous


def _settings(run: _Run) -> dict[str, Any]:
    """Return what decides how a method is trained: the configuration without data, protocol and names."""
    return run.experiment.config.model_dump(
        mode="json", exclude={"name", "output", "data", "protocol", *ASIDE}
    )


def _values(run: _Run, label: str, name: Coordinate) -> dict[tuple[object, ...], float]:
    """Return the values of one row label by their places."""
    return {_place(line): line.value for line in run.results.lines if line.where.get(label) == name}


def _place(line: Line) -> tuple[object, ...]:
    return (line.metric, *sorted((name, str(value)) for name, value in line.where.items()))


def _names(runs: Sequence[_Run]) -> list[str]:
    """Return a name for each run: that of its configuration, with the id where several have it."""
    names = [run.experiment.config.name for run in runs]
    return [
        name if names.count(name) == 1 else f"{name}/{run.folder.resolve().name}"
        for name, run in zip(names, runs, strict=True)
    ]
