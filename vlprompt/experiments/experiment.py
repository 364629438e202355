"""What an experiment says of itself; everything else is the runner's (see :mod:`vlprompt.experiments.runner`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from vlprompt.experiments.cell import Cell, CellResult
from vlprompt.experiments.config import ExperimentConfig
from vlprompt.experiments.layout import Layout, tabulate
from vlprompt.experiments.report import RunRecord
from vlprompt.experiments.results import Results
from vlprompt.experiments.tables import Table
from vlprompt.training.callbacks import Callback

__all__ = ["Experiment", "FinishedRun", "joint_methods"]


@dataclass(frozen=True)
class FinishedRun:
    """A finished run that shares tables with others.

    Attributes:
        folder: Its own.
        experiment: Built from its configuration.
        results: Its long table, with its own labels.
        labels: Label of a method in the run to its label in the common tables, where they differ.
    """

    folder: Path
    experiment: Experiment
    results: Results
    labels: Mapping[str, str]

    def label(self, method: str) -> str:
        """Return what a method of the run is called in the common tables."""
        return self.labels.get(method, method)


class Experiment(ABC):
    """Data and three functions: which cells there are, how one is run, how results are laid out.

    It must be possible to build the same experiment from its configuration alone: an executor does so once in each
    process. What cells share (a backbone, cached features) is built on first use.

    Args:
        config: Checked as a whole already.
    """

    config: ExperimentConfig
    on_validation: ClassVar[tuple[str, ...]] = ()
    """Overrides with which every score is one of validation data; empty: its scores are of test data, always."""
    callbacks: tuple[Callback, ...] = ()
    """What :func:`vlprompt.run` was given: takes part in every training of every cell."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def cells(self) -> list[Cell]:
        """Return every cell in order; a cell stands behind those it needs. Nothing is read or built for it."""

    @abstractmethod
    def run(self, cell: Cell, folder: Path) -> CellResult:
        """Run one cell.

        Args:
            cell: One of :meth:`cells`.
            folder: The cell's own. Files may be left there; what an interrupted attempt left is there to continue
                from. The folders of other cells are its neighbours, by their names.
        """

    def cost(self, cell: Cell) -> float:
        """Return how long a cell takes beside others of this experiment, in any unit; nothing is read for it.

        An engine with a queue packs cells into jobs by it. It is the number of shots unless an experiment knows better.
        """
        shots = cell.get("shots")
        return float(shots) if isinstance(shots, int) and shots > 0 else 1.0

    @abstractmethod
    def layout(self) -> Layout:
        """Return how results are laid out."""

    def sources(self) -> dict[str, str]:
        """Return name to fingerprint of all data and all starting weights that are read from files.

        They are part of the run's id: with other images, or with another checkpoint, it is another run.
        """
        return {}

    def missing(self) -> list[str]:
        """Return what must be fetched or made before the experiment can run, a sentence each."""
        return []

    def facts(self) -> dict[str, Any]:
        """Return what ``metrics.json`` says beside figures: protocol, data, shots, seeds ..."""
        return {}

    def sketch(self, cell: Cell) -> CellResult:
        """Return the metrics that a cell will have whatever is learned, with made-up values; nothing is read for it."""
        return CellResult()

    def figures(self) -> list[str]:
        """Return the keys of ``metrics.json`` that can be foretold (see :meth:`sketch`); a run may have more."""
        results = Results.of({cell: self.sketch(cell) for cell in self.cells()})
        return list(self.summary(results))

    def summary(self, results: Results) -> dict[str, float]:
        """Return the figures of ``metrics.json``, computed from the long table."""
        raise NotImplementedError

    def tables(self, results: Results) -> list[Table]:
        """Return the tables for people; those of the layout unless a protocol has its own."""
        return tabulate(results, self.layout())

    def kind(self) -> str:
        """Return what runs of one task must have in common to share tables: the name of the protocol."""
        return str(self.facts().get("protocol", ""))

    def common_tables(self, results: Results, runs: Sequence[FinishedRun]) -> list[Table]:
        """Return tables that several finished runs share; here those of the first run, which read the lines alone.

        Args:
            results: The lines of all runs, with the labels of the common tables.
            runs: All of them, of this task and :meth:`kind`; this experiment is the first one's.

        Raises:
            DataError: If rows of these runs do not belong in one table.
        """
        return self.tables(results)

    def page(self, record: RunRecord, results: Results, folder: Path) -> None:
        """Add to the report what only this experiment can show.

        Args:
            record: Title, figures and tables stand in it already; changed in place.
            results: All lines.
            folder: The run's; cells lie in ``folder / "cells"``. The page must depend on files and on nothing that
                only an uninterrupted run has in memory.
        """

    def write_files(self, results: Results, folder: Path) -> None:
        """Write further files of the whole run, for example a figure."""


def joint_methods(runs: Sequence[FinishedRun]) -> dict[str, Any]:
    """Return the section ``methods`` of all runs, by the labels of the common tables."""
    return {
        run.label(label): options
        for run in runs
        for label, options in run.experiment.config.model_dump()["methods"].items()
    }
