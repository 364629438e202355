"""What one method gains over another that ran the same cells: paired, task by task and seed by seed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from vlprompt.experiments.cells import Cell
from vlprompt.experiments.statistics import paired_difference

__all__ = ["paired_gains"]

Numbers = Mapping[str, float]


def paired_gains(
    ours: Mapping[Cell, Numbers], theirs: Mapping[Cell, Numbers], metric: str = "accuracy"
) -> dict[str, float]:
    """Compare two sets of cells, task by task and seed by seed.

    Returns:
        For k shots ``gain/shots<k>/<metric>``: the mean difference over tasks, with ``_std`` and ``_ci95`` over seeds;
        ``gain_over_tasks/...``: the same mean, with the interval over tasks (each the mean of its seeds); and
        ``gain/<task>/...`` if there are several. Seeds that a task lacks are left out.
    """
    others = {_key(cell): numbers[metric] for cell, numbers in theirs.items()}
    mine = {_key(cell): numbers[metric] for cell, numbers in ours.items()}
    pairs = {key: (mine[key], others[key]) for key in mine if key in others}
    flat: dict[str, float] = {}
    for shots in dict.fromkeys(shots for _, shots, _ in pairs):
        here = {(task, seed): pair for (task, k, seed), pair in pairs.items() if k == shots}
        tasks = list(dict.fromkeys(task for task, _ in here))
        seeds = [s for s in dict.fromkeys(s for _, s in here) if all((t, s) in here for t in tasks)]
        if not seeds:  # averages over different tasks don't compare
            continue
        a, b = (np.array([[here[t, s][side] for t in tasks] for s in seeds]) for side in (0, 1))
        key = f"shots{shots}/{metric}"
        flat |= paired_difference(list(a.mean(1)), list(b.mean(1))).flat(f"gain/{key}")
        flat |= paired_difference(list(a.mean(0)), list(b.mean(0))).flat(f"gain_over_tasks/{key}")
        for number, task in enumerate(tasks if len(tasks) > 1 else []):
            flat |= paired_difference(list(a[:, number]), list(b[:, number])).flat(f"gain/{task}/{key}")
    return flat


def _key(cell: Cell) -> tuple[str, int, int]:
    return cell.dataset, cell.shots, cell.seed
