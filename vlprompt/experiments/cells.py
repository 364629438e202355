"""Cells of a protocol: what is run once, what becomes of it when it fails, and how many become one result."""

from __future__ import annotations

import hashlib
import logging
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from vlprompt.experiments.statistics import summarise

__all__ = [
    "Cell",
    "Failure",
    "ProtocolResult",
    "RunCell",
    "averages",
    "over_datasets",
    "over_seeds",
    "run_cells",
    "unprefixed",
]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cell:
    """One training run of a protocol.

    Attributes:
        dataset: Catalogue name.
        shots: Training samples per class.
        seed: Seed of the few-shot draw and of the run.
        base: Classes to train on and to score as "base"; None means all classes.
        new: Classes to score without training on them; None means there are none.
        target: Another data set that what was learned is scored on, without training; None for ``dataset`` itself.
    """

    dataset: str
    shots: int
    seed: int
    base: tuple[int, ...] | None = None
    new: tuple[int, ...] | None = None
    target: str | None = None

    @property
    def name(self) -> str:
        """A name for logs and folders, for example ``"scenes-shape_16shots_seed1"``."""
        there = f"_on_{_plain(self.target)}" if self.target else ""
        return f"{_plain(self.dataset)}_{self.shots}shots_seed{self.seed}{there}"


@dataclass(frozen=True)
class Failure:
    """A cell that raised, and what it raised."""

    cell: Cell
    error: Exception

    @property
    def message(self) -> str:
        """What to tell people."""
        return str(self.error) or type(self.error).__name__

    @property
    def stack(self) -> str:
        """The stack, for developers."""
        return "".join(traceback.format_exception(self.error))


RunCell = Callable[[Cell], Mapping[str, float]]


@dataclass
class ProtocolResult:
    """What a protocol found.

    Attributes:
        protocol: Its name, for example ``"coop-fewshot"``.
        metrics: Flat keys for metrics.json; fractions.
        headline: The key of ``metrics`` to print first.
        cells: The numbers of every finished cell.
        failures: The cells that raised.
    """

    protocol: str
    metrics: dict[str, float] = field(default_factory=dict)
    headline: str = "accuracy"
    cells: dict[Cell, dict[str, float]] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0 if every cell finished, else 1."""
        return 1 if self.failures else 0

    def record(self) -> dict[str, Any]:
        """Return everything as JSON-able data, failures included."""
        return {
            "protocol": self.protocol,
            "metrics": self.metrics,
            "cells": [{**asdict(cell), "metrics": numbers} for cell, numbers in self.cells.items()],
            "failures": [{**asdict(f.cell), "message": f.message, "stack": f.stack} for f in self.failures],
        }


def run_cells(protocol: str, plan: Iterable[Cell], run_cell: RunCell) -> ProtocolResult:
    """Run every cell; one that raises is recorded and the others go on."""
    result = ProtocolResult(protocol)
    for cell in plan:
        try:
            result.cells[cell] = {key: float(value) for key, value in run_cell(cell).items()}
        except Exception as error:  # hours of finished cells must survive whatever one of them does
            result.failures.append(Failure(cell, error))
            log.error("%s: %s failed: %s", protocol, cell.name, result.failures[-1].message)
    result.metrics["runs"] = float(len(result.cells) + len(result.failures))
    result.metrics["runs_failed"] = float(len(result.failures))
    return result


def over_datasets(
    result: ProtocolResult,
    datasets: Sequence[str],
    plan: Sequence[Cell],
    prefix: str,
    always_named: bool = False,
) -> dict[str, float]:
    """Summarise over seeds: each data set, and their average per seed."""
    done = {
        d: {c.seed: result.cells[c] for c in plan if c.dataset == d and c in result.cells} for d in datasets
    }
    flat: dict[str, float] = {}
    if len(datasets) > 1 or always_named:
        for dataset, by_seed in done.items():
            flat |= over_seeds(list(by_seed.values()), f"{dataset}/{prefix}")
    return flat | over_seeds(averages(done, list(dict.fromkeys(c.seed for c in plan))), prefix)


def averages(
    done: Mapping[Any, Mapping[int, Mapping[str, float]]], seeds: Sequence[int]
) -> list[dict[str, float]]:
    """Return the average over data sets of each seed; one that a data set lacks would shift it, and is left out."""
    complete = [s for s in seeds if all(s in by_seed for by_seed in done.values())]
    return [_average([by_seed[s] for by_seed in done.values()]) for s in complete]


def over_seeds(runs: Sequence[Mapping[str, float]], prefix: str) -> dict[str, float]:
    """Return mean, ``_std`` and ``_ci95`` of every key that all runs have, with a prefix."""
    flat: dict[str, float] = {}
    for key in _common_keys(runs):
        flat |= summarise([run[key] for run in runs]).flat(f"{prefix}{key}")
    return flat


def _average(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: summarise([run[key] for run in runs]).mean for key in _common_keys(runs)}


def _common_keys(runs: Sequence[Mapping[str, float]]) -> list[str]:
    return [key for key in runs[0] if all(key in run for run in runs)] if runs else []


def unprefixed(metrics: Mapping[str, float], prefix: str, kept: str = "") -> dict[str, float]:
    """Return the entries below a prefix without it, or with another one."""
    return {
        f"{kept}{key.removeprefix(prefix)}": value for key, value in metrics.items() if key.startswith(prefix)
    }


def _plain(name: str) -> str:
    """Return a data set's name as part of a file's: a path keeps its end and gets a checksum of the rest."""
    if ":" not in name:
        return name.replace("/", "-")
    kind, _, path = name.partition(":")
    end = "".join(c if c.isalnum() or c in "._-" else "-" for c in path.rstrip("/").rpartition("/")[2])
    return f"{kind}-{end}-{hashlib.sha256(path.encode()).hexdigest()[:6]}"
