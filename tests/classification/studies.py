"""Small runs for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlprompt.classification.config import ClassificationConfig, Study
from vlprompt.classification.experiment import ClassificationExperiment
from vlprompt.classification.protocols import protocol_of
from vlprompt.experiments.cell import Cell, CellResult
from vlprompt.experiments.results import Results
from vlprompt.experiments.runner import RunOutcome, run_experiment


def run(path: Path, overrides: Sequence[str] = (), **options: Any) -> RunOutcome:
    """Run a configuration file."""
    return run_experiment(ClassificationExperiment(ClassificationConfig.read(path, overrides)), **options)


def study(protocol: Mapping[str, Any], data: list[str], method: str = "coop", **sections: Any) -> Study:
    """Return a study of one learner."""
    content = {"task": "classification", "data": {"name": data}, "protocol": protocol, **sections}
    return Study(method, ClassificationConfig.model_validate(content))


def measured(planned: Study, measure: Callable[[Cell], Mapping[str, float] | None]) -> Results:
    """Return the long table of a study whose cells measure what a function says; None is a cell that failed.

    A metric may be ``part/metric``.
    """
    finished: dict[Cell, CellResult] = {}
    for cell in protocol_of(planned.config.protocol.name).planned(planned):
        numbers = measure(cell)
        if numbers is None:
            continue
        result = CellResult()
        for key, value in numbers.items():
            part, _, metric = key.rpartition("/")
            result.add({metric: value}, **({"part": part} if part else {}))
        finished[cell] = result
    return Results.of(finished)


def figures(planned: Study, measure: Callable[[Cell], Mapping[str, float] | None]) -> dict[str, float]:
    """Return the figures of such a study."""
    return protocol_of(planned.config.protocol.name).summary(measured(planned, measure), planned)
