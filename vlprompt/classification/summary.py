"""From lines of the long table to the flat figures of ``metrics.json``: means over seeds, averages over data sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlprompt.experiments.results import Results
from vlprompt.experiments.statistics import summarise

__all__ = ["Numbers", "averages", "numbers_by", "numbers_by_data", "over_datasets", "over_seeds"]

Numbers = Mapping[str, float]
"""Metric to value; a metric of a part is called ``<part>/<metric>``."""


def numbers_by(results: Results, coordinate: str = "seed") -> dict[Any, dict[str, float]]:
    """Return the numbers at each value of a coordinate."""
    numbers: dict[Any, dict[str, float]] = {}
    for line in results.lines:
        part = line.where.get("part")
        metric = f"{part}/{line.metric}" if part else line.metric
        numbers.setdefault(line.where.get(coordinate), {})[metric] = line.value
    return numbers


def numbers_by_data(results: Results, datasets: Sequence[str]) -> dict[str, dict[int, dict[str, float]]]:
    """Return the numbers of each data set and seed; a data set that failed has none."""
    return {name: numbers_by(results.select(data=name)) for name in datasets}


def over_datasets(
    by_data: Mapping[str, Mapping[int, Numbers]],
    seeds: Sequence[int],
    prefix: str,
    always_named: bool = False,
) -> dict[str, float]:
    """Summarise over seeds: each data set, and their average per seed.

    Args:
        by_data: Data set to seed to numbers.
        seeds: Those of the protocol.
        prefix: Put before every key.
        always_named: Whether a single data set has keys of its own too.
    """
    flat: dict[str, float] = {}
    if len(by_data) > 1 or always_named:
        for name, by_seed in by_data.items():
            flat |= over_seeds(list(by_seed.values()), f"{name}/{prefix}")
    return flat | over_seeds(averages(by_data, seeds), prefix)


def averages(by_data: Mapping[Any, Mapping[int, Numbers]], seeds: Sequence[int]) -> list[dict[str, float]]:
    """Return the average over data sets of each seed; one that a data set lacks would shift it, and is left out."""
    complete = [seed for seed in seeds if all(seed in by_seed for by_seed in by_data.values())]
    return [_average([by_seed[seed] for by_seed in by_data.values()]) for seed in complete]


def over_seeds(repetitions: Sequence[Numbers], prefix: str) -> dict[str, float]:
    """Return mean, ``_std`` and ``_ci95`` of every metric that all repetitions have, with a prefix."""
    flat: dict[str, float] = {}
    for key in _common_keys(repetitions):
        flat |= summarise([numbers[key] for numbers in repetitions]).flat(f"{prefix}{key}")
    return flat


def _average(numbers: Sequence[Numbers]) -> dict[str, float]:
    return {key: float(np.mean([part[key] for part in numbers])) for key in _common_keys(numbers)}


def _common_keys(repetitions: Sequence[Numbers]) -> list[str]:
    if not repetitions:
        return []
    return [key for key in repetitions[0] if all(key in numbers for numbers in repetitions)]
