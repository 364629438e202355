"""One trial of a search: the experiment with some values in place of others, run on validation data."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlprompt.core.errors import UnknownNameError, VLPromptError
from vlprompt.experiments.experiment import Experiment
from vlprompt.experiments.runner import RunOutcome, run_experiment
from vlprompt.experiments.search.options import SearchOptions
from vlprompt.experiments.search.study import Attempt
from vlprompt.experiments.tasks import read_experiment
from vlprompt.training.callbacks import Callback, TrainingView

__all__ = ["Trials", "as_overrides"]


@dataclass(frozen=True)
class Trials:
    """Runs the trials of a search, one run each.

    Attributes:
        cfg: The configuration that is searched.
        overrides: Changes to it, as on the command line.
        options: What is searched.
        folder: Runs of trials are written below it.
    """

    cfg: str
    overrides: Sequence[str]
    options: SearchOptions
    folder: Path

    def experiment(self, params: Mapping[str, Any], *more: str) -> Experiment:
        """Return the experiment of a trial: scored on validation data, with what the search changes in all trials.

        Args:
            params: Dotted key to value.
            *more: Further overrides.
        """
        plain = read_experiment(self.cfg, self.overrides)
        changes = as_overrides(self.options.changes)
        return self.best_experiment(params, *changes, *plain.on_validation, *more)

    def best_experiment(self, params: Mapping[str, Any], *more: str) -> Experiment:
        """Return the experiment with some values, and nothing else changed."""
        return read_experiment(self.cfg, [*self.overrides, *as_overrides(params), *more])

    def run(self, attempt: Attempt) -> float:
        """Run one attempt, or continue it, and return the objective.

        Raises:
            VLPromptError: If a cell failed, or the run has no such figure.
            TrialEnded: If the trial is worse than others.
        """
        places = (f"name={attempt.place:04d}", f"output={self.folder}")
        experiment = self.experiment(attempt.params, *places)
        watch = _Watch(attempt, self.options.monitor)
        outcome = run_experiment(experiment, progress=watch.on_progress, callbacks=[watch])
        return self._objective(outcome)

    def _objective(self, outcome: RunOutcome) -> float:
        if outcome.failures:
            raise VLPromptError(outcome.failures[0])

        name = self.options.objective
        value = outcome.metrics.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            figures = [key for key, figure in outcome.metrics.items() if isinstance(figure, float)]
            raise VLPromptError(f"search.objective: {UnknownNameError('figure', name, figures)}")
        if not math.isfinite(value):
            raise VLPromptError(f"{name} is {value}.")
        return float(value)


class _Watch(Callback):
    """Tells an attempt the monitored figure of every epoch and cell.

    Args:
        attempt: Ends where it is worse than others.
        monitor: Name of the figure; empty tells nothing.
    """

    def __init__(self, attempt: Attempt, monitor: str) -> None:
        self.attempt = attempt
        self.monitor = monitor
        self.cell = 0

    def on_progress(self, name: str, done: int, total: int) -> None:
        """Note which cell comes next; a run that continues begins behind those that are finished."""
        self.cell = done

    def on_epoch(self, trainer: TrainingView, record: dict[str, Any]) -> None:
        """See :meth:`Callback.on_epoch`."""
        if self.monitor in record:
            self.attempt.report(self.cell, record["epoch"], record[self.monitor])

    def on_cell(self, cell: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """See :meth:`Callback.on_cell`."""
        if self.monitor in metrics:
            self.attempt.report(self.cell, None, metrics[self.monitor])


def as_overrides(params: Mapping[str, Any]) -> list[str]:
    """Return dotted keys and values as they are written on the command line."""
    return [
        f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in params.items()
    ]
