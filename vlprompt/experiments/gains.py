"""What one method gains over another that ran the same cells: paired, task by task and seed by seed."""

from __future__ import annotations

import numpy as np

from vlprompt.experiments.cell import Coordinate
from vlprompt.experiments.results import Results
from vlprompt.experiments.statistics import paired_difference

__all__ = ["paired_gains"]


def paired_gains(ours: Results, theirs: Results, name: str) -> dict[str, float]:
    """Compare two sets of lines of one metric, data set by data set and seed by seed.

    Args:
        ours: One line for each data set, number of shots and seed.
        theirs: The same of the baseline.
        name: Of the metric, in keys.

    Returns:
        For k shots ``gain/shots<k>/<name>``: the mean difference over data sets, with ``_std`` and ``_ci95`` over
        seeds. ``gain_over_tasks/...``: the same mean, with the interval over data sets, each the mean of its seeds.
        ``gain/<data set>/...`` if there are several. Seeds that a data set lacks are left out.
    """
    mine = _by_place(ours)
    other = _by_place(theirs)
    shared = [key for key in mine if key in other]
    figures: dict[str, float] = {}

    for shots in dict.fromkeys(shots for _, shots, _ in shared):
        pairs = {(data, seed): (data, shots, seed) for data, k, seed in shared if k == shots}
        datasets = list(dict.fromkeys(data for data, _ in pairs))
        seeds = list(dict.fromkeys(seed for _, seed in pairs))

        seeds = [seed for seed in seeds if all((data, seed) in pairs for data in datasets)]
        if not seeds:  # averages over different data sets don't compare
            continue

        a = np.array([[mine[pairs[data, seed]] for data in datasets] for seed in seeds])
        b = np.array([[other[pairs[data, seed]] for data in datasets] for seed in seeds])
        key = f"shots{shots}/{name}"
        figures |= paired_difference(list(a.mean(1)), list(b.mean(1))).flat(f"gain/{key}")
        figures |= paired_difference(list(a.mean(0)), list(b.mean(0))).flat(f"gain_over_tasks/{key}")

        if len(datasets) > 1:
            for number, data in enumerate(datasets):
                gain = paired_difference(list(a[:, number]), list(b[:, number]))
                figures |= gain.flat(f"gain/{data}/{key}")

    return figures


def _by_place(results: Results) -> dict[tuple[Coordinate, Coordinate, Coordinate], float]:
    values = {}
    for line in results.lines:
        key = (line.where.get("data"), line.where.get("shots"), line.where.get("seed"))
        values[key] = line.value
    return values
