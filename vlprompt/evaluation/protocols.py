"""Protocols with names: which runs they are made of, and how the runs' numbers become one result.

Planning and aggregation only. Training and scoring one cell is a function handed in, so the same protocols
serve any trainer, an adapter, or a table of numbers read from disk.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from vlprompt.errors import DataError
from vlprompt.evaluation.statistics import harmonic_mean, summarise

__all__ = ["Cell", "Failure", "ProtocolResult", "RunCell", "base_to_new", "coop_fewshot", "split_base_new"]

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
    """

    dataset: str
    shots: int
    seed: int
    base: tuple[int, ...] | None = None
    new: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        """A name for logs and folders, for example ``"scenes-shape_16shots_seed1"``."""
        return f"{self.dataset.replace('/', '-')}_{self.shots}shots_seed{self.seed}"


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
        protocol: Its name, ``"coop-fewshot"`` or ``"base-to-new"``.
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


def split_base_new(classes: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Cut class indices 0..classes-1 into the first ceil(C/2) ("base") and the rest ("new").

    Zhou et al., "Conditional prompt learning" (CVPR 2022), section 4.1.

    Raises:
        DataError: If there are fewer than two classes.
    """
    if classes < 2:
        raise DataError(f"base-to-new needs at least 2 classes, got {classes}.")
    half = -(-classes // 2)
    return tuple(range(half)), tuple(range(half, classes))


def coop_fewshot(
    datasets: Sequence[str],
    run_cell: RunCell,
    shots: Sequence[int] = (1, 2, 4, 8, 16),
    seeds: Sequence[int] = (1, 2, 3),
) -> ProtocolResult:
    """Train k-shot on all classes and test on all classes, for every data set, k and seed.

    Zhou et al., "Learning to prompt for vision-language models" (IJCV 2022), section 4.1.

    Args:
        datasets: Catalogue names.
        run_cell: Trains and scores one cell; returns fractions, among them ``"accuracy"``.
        shots: Values of k.
        seeds: One run per seed.

    Returns:
        ``shots16/accuracy`` with ``_std`` and ``_ci95`` per k (over the seeds of the average over data sets),
        the same below ``<dataset>/`` if there are several, and ``accuracy`` for the largest k.
    """
    plan = [Cell(d, k, s) for d in datasets for k in shots for s in seeds]
    result = _run("coop-fewshot", plan, run_cell)
    for k in shots:
        result.metrics |= _over_datasets(result, datasets, [c for c in plan if c.shots == k], f"shots{k}/")
    result.metrics |= _unprefixed(result.metrics, f"shots{max(shots)}/")
    return result


def base_to_new(
    class_counts: Mapping[str, int], run_cell: RunCell, shots: int = 16, seeds: Sequence[int] = (1, 2, 3)
) -> ProtocolResult:
    """Train k-shot on the first half of the classes, test on each half with its own names only.

    Zhou et al., "Conditional prompt learning" (CVPR 2022), section 4.1. The harmonic mean is that of the two
    mean accuracies, as published; its interval comes from the harmonic means of the single seeds.

    Args:
        class_counts: Number of classes C of every data set.
        run_cell: Trains on ``cell.base``; returns at least ``"base/accuracy"`` and ``"new/accuracy"``.
        shots: Training samples per base class.
        seeds: One run per seed.

    Returns:
        ``base/accuracy``, ``new/accuracy`` and ``harmonic_mean`` with ``_std`` and ``_ci95``; below
        ``<dataset>/`` too if there are several, where the overall ``harmonic_mean`` is that of the averages.
    """

    def run(cell: Cell) -> dict[str, float]:
        numbers = dict(run_cell(cell))
        return {**numbers, "harmonic_mean": harmonic_mean(numbers["base/accuracy"], numbers["new/accuracy"])}

    plan = [Cell(d, shots, s, *split_base_new(n)) for d, n in class_counts.items() for s in seeds]
    result = _run("base-to-new", plan, run)
    result.headline = "harmonic_mean"
    result.metrics |= _over_datasets(result, list(class_counts), plan, "")
    for prefix in {
        key.removesuffix("harmonic_mean") for key in result.metrics if key.endswith("harmonic_mean")
    }:
        base, new = (result.metrics[f"{prefix}{part}/accuracy"] for part in ("base", "new"))
        result.metrics[f"{prefix}harmonic_mean"] = harmonic_mean(base, new)
    return result


def _run(protocol: str, plan: Iterable[Cell], run_cell: RunCell) -> ProtocolResult:
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


def _over_datasets(
    result: ProtocolResult, datasets: Sequence[str], plan: Sequence[Cell], prefix: str
) -> dict[str, float]:
    """Summarise over seeds: each data set, and their average per seed."""
    done = {
        d: {c.seed: result.cells[c] for c in plan if c.dataset == d and c in result.cells} for d in datasets
    }
    flat: dict[str, float] = {}
    if len(datasets) > 1:
        for dataset, by_seed in done.items():
            flat |= _over_seeds(list(by_seed.values()), f"{dataset}/{prefix}")
    # A seed that one data set lacks would shift the average, so only complete seeds count.
    seeds = [s for s in dict.fromkeys(c.seed for c in plan) if all(s in by_seed for by_seed in done.values())]
    averages = [_average([by_seed[s] for by_seed in done.values()]) for s in seeds]
    return flat | _over_seeds(averages, prefix)


def _over_seeds(runs: Sequence[Mapping[str, float]], prefix: str) -> dict[str, float]:
    flat: dict[str, float] = {}
    for key in _common_keys(runs):
        flat |= summarise([run[key] for run in runs]).flat(f"{prefix}{key}")
    return flat


def _average(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: summarise([run[key] for run in runs]).mean for key in _common_keys(runs)}


def _common_keys(runs: Sequence[Mapping[str, float]]) -> list[str]:
    return [key for key in runs[0] if all(key in run for run in runs)] if runs else []


def _unprefixed(metrics: Mapping[str, float], prefix: str) -> dict[str, float]:
    return {key.removeprefix(prefix): value for key, value in metrics.items() if key.startswith(prefix)}
