"""Protocols with names: which runs they are made of, and how the runs' numbers become one result.

Planning and aggregation only. Training and scoring one cell is a function handed in, so the same protocols
serve any trainer, an adapter, or a table of numbers read from disk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from vlprompt.core.errors import DataError
from vlprompt.experiments.cells import (
    Cell,
    Failure,
    ProtocolResult,
    RunCell,
    averages,
    over_datasets,
    over_seeds,
    run_cells,
    unprefixed,
)
from vlprompt.experiments.statistics import harmonic_mean

__all__ = [
    "Cell",
    "Failure",
    "ProtocolResult",
    "RunCell",
    "across",
    "base_to_new",
    "coop_fewshot",
    "elevater",
    "split_base_new",
]


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
    return _few_shot("coop-fewshot", datasets, run_cell, shots, seeds)


def elevater(
    datasets: Sequence[str],
    run_cell: RunCell,
    shots: Sequence[int] = (5, 20, 50),
    seeds: Sequence[int] = (1, 2, 3),
) -> ProtocolResult:
    """Train k-shot on every data set and score each by its own measure; the score is their unweighted mean.

    Li et al., "ELEVATER" (NeurIPS 2022), section 4. Cells are to be drawn with ``sampling="elevater"``, so k shots
    are 4/5 k to train on and 1/5 k to validate on.

    Args:
        datasets: Catalogue names.
        run_cell: Trains and scores one cell; returns fractions, among them ``"score"``.
        shots: Values of k.
        seeds: One run per seed.

    Returns:
        As :func:`coop_fewshot`; the headline is ``score``, and every data set has its own keys.
    """
    result = _few_shot("elevater", datasets, run_cell, shots, seeds, always_named=True)
    result.headline = "score"
    return result


def base_to_new(
    datasets: Sequence[str],
    count_classes: Callable[[str], int],
    run_cell: RunCell,
    shots: int = 16,
    seeds: Sequence[int] = (1, 2, 3),
) -> ProtocolResult:
    """Train k-shot on the first half of the classes, test on each half with its own names only.

    Zhou et al., "Conditional prompt learning" (CVPR 2022), section 4.1. The harmonic mean is that of the two
    mean accuracies, as published; its interval comes from the harmonic means of the single seeds.

    Args:
        datasets: Catalogue names.
        count_classes: Number of classes C of a data set; if it raises, that data set's cells fail and others go on.
        run_cell: Trains on ``cell.base``; returns at least ``"base/accuracy"`` and ``"new/accuracy"``.
        shots: Training samples per base class.
        seeds: One run per seed.

    Returns:
        ``base/accuracy``, ``new/accuracy`` and ``harmonic_mean`` with ``_std`` and ``_ci95``; below
        ``<dataset>/`` too if there are several, where the overall ``harmonic_mean`` is that of the averages.
    """

    def run(cell: Cell) -> dict[str, float]:
        if cell.base is None:  # its classes could not be counted; the cell says why
            count_classes(cell.dataset)
        numbers = dict(run_cell(cell))
        return {**numbers, "harmonic_mean": harmonic_mean(numbers["base/accuracy"], numbers["new/accuracy"])}

    halves = {d: _halves(d, count_classes) for d in datasets}
    plan = [Cell(d, shots, s, *halves[d]) for d in datasets for s in seeds]
    result = run_cells("base-to-new", plan, run)
    result.headline = "harmonic_mean"
    result.metrics |= over_datasets(result, datasets, plan, "")
    for prefix in {
        key.removesuffix("harmonic_mean") for key in result.metrics if key.endswith("harmonic_mean")
    }:
        base, new = (result.metrics[f"{prefix}{part}/accuracy"] for part in ("base", "new"))
        result.metrics[f"{prefix}harmonic_mean"] = harmonic_mean(base, new)
    return result


def across(
    protocol: str,
    source: str | Sequence[str],
    targets: Sequence[str],
    run_cell: RunCell,
    shots: int = 16,
    seeds: Sequence[int] = (1, 2, 3),
) -> ProtocolResult:
    """Train k-shot on all classes of one data set, then score what was learned on others, without adapting to them.

    Cross-dataset transfer to other tasks (Zhou et al., CVPR 2022, section 4.2) and generalisation to other domains
    of the same classes (section 4.3) are the same runs; only the choice of targets differs.

    Args:
        protocol: ``"cross-dataset"`` or ``"domain-generalisation"``.
        source: Catalogue name to train on; of several, each is trained on by itself, and figures are averages over
            them. A source that is a target too is not scored on itself.
        targets: Catalogue names to score.
        run_cell: Trains and scores a cell without ``target``; scores one with it, after the source cell of its seed.
        shots: Training samples per class of the source.
        seeds: One run per seed.

    Returns:
        ``source/...`` and ``<target>/...`` for every target, and without prefix the average over the targets, which
        as published leaves the source out; each with ``_std`` and ``_ci95`` over seeds. The headline is ``score``.
    """
    sources = [source] if isinstance(source, str) else list(source)
    targets = [t for t in targets if sources != [t]]
    plan = [
        cell
        for first in (Cell(d, shots, s) for d in sources for s in seeds)
        for cell in (first, *(replace(first, target=t) for t in targets if t != first.dataset))
    ]
    result = run_cells(protocol, plan, run_cell)
    result.headline = "score"
    by_target: dict[str | None, dict[int, dict[str, float]]] = {}
    for target in (None, *targets):
        done = {
            d: {c.seed: n for c, n in result.cells.items() if (c.dataset, c.target) == (d, target)}
            for d in sources
            if d != target
        }
        by_target[target] = {seed: mean for seed in seeds for mean in averages(done, [seed])}
    for target, by_seed in by_target.items():
        result.metrics |= over_seeds(list(by_seed.values()), f"{target or 'source'}/")
    del by_target[None]
    result.metrics |= over_seeds(averages(by_target, seeds), "")
    return result


def _few_shot(
    protocol: str,
    datasets: Sequence[str],
    run_cell: RunCell,
    shots: Sequence[int],
    seeds: Sequence[int],
    always_named: bool = False,
) -> ProtocolResult:
    plan = [Cell(d, k, s) for d in datasets for k in shots for s in seeds]
    result = run_cells(protocol, plan, run_cell)
    for k in shots:
        here = [c for c in plan if c.shots == k]
        result.metrics |= over_datasets(result, datasets, here, f"shots{k}/", always_named)
    largest = f"shots{max(shots)}/"
    for prefix in ("", *(f"{d}/" for d in datasets if always_named)):
        result.metrics |= unprefixed(result.metrics, f"{prefix}{largest}", prefix)
    return result


def _halves(dataset: str, count_classes: Callable[[str], int]) -> tuple[Any, Any]:
    try:
        return split_base_new(count_classes(dataset))
    except Exception:  # told again, with its reason, by the cells of this data set
        return None, None
