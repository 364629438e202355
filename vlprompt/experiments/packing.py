"""Cells packed into jobs of about the same length."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from pathlib import Path

from vlprompt.experiments.cell import Cell
from vlprompt.experiments.cell_folder import CellFolder
from vlprompt.experiments.experiment import Experiment

__all__ = ["expected_costs", "pack"]


def expected_costs(experiment: Experiment, run: Path, cells: Sequence[Cell]) -> dict[Cell, float]:
    """Return how long cells are expected to take, in one unit for all of them.

    A cell whose siblings (the same coordinates but for the seed) have finished takes what they took on average; for the
    others counts what the experiment says, in the measure of those that have finished.

    Args:
        experiment: Whose cells.
        run: The run's folder.
        cells: Those of interest.
    """
    seconds: dict[Cell, list[float]] = {}
    total_seconds = 0.0
    total_cost = 0.0

    for cell in experiment.cells():
        took = sum(CellFolder.of(run, cell).timings().values())
        if took > 0:
            seconds.setdefault(cell.sibling(seed=None), []).append(took)
            total_seconds += took
            total_cost += experiment.cost(cell)

    rate = total_seconds / total_cost if total_cost else 1.0
    costs = {}
    for cell in cells:
        known = seconds.get(cell.sibling(seed=None))
        costs[cell] = sum(known) / len(known) if known else rate * experiment.cost(cell)
    return costs


def pack(costs: Mapping[Cell, float], count: int) -> list[list[Cell]]:
    """Return the cells in at most ``count`` packs, the longest first, each into the pack that is shortest so far.

    The longest pack is at most 4/3 of the shortest possible one (Graham, "Bounds on multiprocessing timing anomalies",
    1969), as far as the costs are right. Inside a pack cells keep their order: those that others need come first.

    Args:
        costs: Of every cell, in the order of the experiment.
        count: Packs, at least 1; none is empty.
    """
    order = {cell: number for number, cell in enumerate(costs)}
    packs: list[list[Cell]] = [[] for _ in range(min(count, len(costs)))]
    lengths = [(0.0, number) for number in range(len(packs))]

    for cell in sorted(costs, key=lambda cell: (-costs[cell], order[cell])):
        length, number = heapq.heappop(lengths)
        packs[number].append(cell)
        heapq.heappush(lengths, (length + costs[cell], number))

    return [sorted(cells, key=order.__getitem__) for cells in packs]
