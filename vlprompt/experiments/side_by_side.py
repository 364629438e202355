"""Finished runs in one table: their long tables are joined, and the rows tell the runs apart where they must."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

from vlprompt.core.errors import CheckpointError
from vlprompt.core.paths import user_path
from vlprompt.experiments.cell import Coordinate
from vlprompt.experiments.config import ASIDE
from vlprompt.experiments.experiment import FinishedRun
from vlprompt.experiments.results import Line, Results
from vlprompt.experiments.tables import Table
from vlprompt.experiments.tasks import read_experiment

__all__ = ["tables_of_runs"]


_LABEL = "method"  # the coordinate whose values tell runs apart


def tables_of_runs(folders: Sequence[str | Path]) -> list[Table]:
    """Return the tables of finished runs.

    One run has its own tables. Runs whose results are laid out alike (the same task and protocol) share tables: a row
    for each method, and where two runs measured the same method in the same place, a row for each of them with the
    run's name behind the method's. Lines that are equal in all runs, such as a common baseline's, are shown once.

    Args:
        folders: Of runs, each with ``config.yaml`` and ``results.jsonl``.

    Raises:
        CheckpointError: If a folder holds no run, or one without results.
        DataError: If a file of results is damaged, or rows of two runs do not belong in one table.
        ConfigError: If a configuration is not one of this version.
    """
    tables: list[Table] = []
    for runs in _groups([_read(folder) for folder in dict.fromkeys(map(user_path, folders))]):
        first = runs[0]
        if len(runs) == 1:
            tables += first.experiment.tables(first.results)
        else:
            labelled = _labelled(runs)
            tables += first.experiment.common_tables(_joined(labelled), labelled)
    return tables


def _read(folder: Path) -> FinishedRun:
    for name in ("config.yaml", "results.jsonl"):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder} is not the folder of a finished run: it has no {name}. Such folders are called "
                "<output>/<name>/<id>, for example runs/coop_tiny/0a1b2c3d."
            )
    experiment = read_experiment(folder / "config.yaml")
    return FinishedRun(folder, experiment, Results.read(folder / "results.jsonl"), {})


def _groups(runs: Sequence[FinishedRun]) -> list[list[FinishedRun]]:
    """Return the runs that share tables: of one kind, and with the same lines where a line is of no method."""
    groups: list[list[FinishedRun]] = []
    for run in runs:
        for group in groups:
            if _kind(run) == _kind(group[0]) and not any(_differ(run, other, None) for other in group):
                group.append(run)
                break
        else:
            groups.append([run])
    return groups


def _kind(run: FinishedRun) -> tuple[object, ...]:
    """Return what runs must have in common to share tables."""
    experiment = run.experiment
    layout = experiment.layout()
    return (
        type(experiment),
        experiment.kind(),
        *(layout.metric, layout.rows, layout.columns, layout.tables),
    )


def _labelled(runs: Sequence[FinishedRun]) -> list[FinishedRun]:
    """Return the runs with labels that tell apart what the same place holds twice."""
    ambiguous = _ambiguous(runs)
    return [
        replace(run, labels={method: f"{method} ({name})" for method in ambiguous})
        for run, name in zip(runs, _names(runs), strict=True)
    ]


def _joined(runs: Sequence[FinishedRun]) -> Results:
    """Return the lines of all runs, with the labels of the common tables."""
    lines: dict[tuple[object, ...], Line] = {}
    for run in runs:
        for line in run.results.lines:
            method = line.where.get(_LABEL)
            if method is not None:
                line = replace(line, where={**line.where, _LABEL: run.label(str(method))})
            lines.setdefault(_place(line), line)  # equal lines of several runs count once
    return Results(lines.values())


def _ambiguous(runs: Sequence[FinishedRun]) -> list[str]:
    """Return the labels of methods that don't mean the same in all runs.

    A label means the same in two runs if what both measured in the same place is equal. Where they have no place in
    common (other data, other seeds), it does if the runs differ in data and protocol only.
    """
    ambiguous: list[str] = []
    for first, second in combinations(runs, 2):
        alike = _settings(first) == _settings(second)
        for name in first.results.coordinates(_LABEL):
            common = _values(first, name).keys() & _values(second, name).keys()
            unlike = not (common or alike) and bool(_values(second, name))
            if name is not None and (unlike or _differ(first, second, name)):
                ambiguous.append(name)
    return list(dict.fromkeys(ambiguous))


def _differ(first: FinishedRun, second: FinishedRun, method: Coordinate) -> bool:
    """Return whether two runs have another value in the same place of a method; None: of no method."""
    ours = _values(first, method)
    theirs = _values(second, method)
    return any(ours[place] != theirs[place] for place in ours.keys() & theirs.keys())


def _settings(run: FinishedRun) -> dict[str, Any]:
    """Return what decides how a method is trained: the configuration without data, protocol and names."""
    return run.experiment.config.model_dump(
        mode="json", exclude={"name", "output", "data", "protocol", *ASIDE}
    )


def _values(run: FinishedRun, label: Coordinate) -> dict[tuple[object, ...], float]:
    """Return the values of one method by their places."""
    return {_place(line): line.value for line in run.results.lines if line.where.get(_LABEL) == label}


def _place(line: Line) -> tuple[object, ...]:
    return (line.metric, *sorted((name, str(value)) for name, value in line.where.items()))


def _names(runs: Sequence[FinishedRun]) -> list[str]:
    """Return a name for each run: that of its configuration, with the id where several have it."""
    names = [run.experiment.config.name for run in runs]
    return [
        name if names.count(name) == 1 else f"{name}/{run.folder.resolve().name}"
        for name, run in zip(names, runs, strict=True)
    ]
