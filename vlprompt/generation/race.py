"""Who is there first: steps, and seconds, to the best similarity that the baseline ever reaches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from vlprompt.experiments.results import Results
from vlprompt.experiments.statistics import summarise

__all__ = ["Clock", "Race", "arrivals", "races_of", "timing_figures", "timing_table"]

_LAST = 3  # measurements whose mean is what a method reaches in the end

Clock = Mapping[int, float]
"""Step to seconds of training so far, at every step where the similarity was measured."""


@dataclass(frozen=True)
class Race:
    """What every method measured on one concept with one seed.

    Attributes:
        concept: Its name.
        seed: Of training and of samples.
        curves: Method to (step, similarity), in the order of steps.
    """

    concept: str
    seed: int
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    def first(self, method: str) -> float:
        """Return the similarity before the first step."""
        return self.curves[method][0][1]

    def best(self, method: str) -> float:
        """Return the highest similarity a method ever had."""
        return max(similarity for _, similarity in self.curves[method])

    def last(self, method: str) -> float:
        """Return the similarity a method ends with: the mean of its last three measurements."""
        return float(np.mean([similarity for _, similarity in self.curves[method][-_LAST:]]))

    def arrival(self, method: str, goal: float) -> int | None:
        """Return the first step at which a method was measured at the goal or above; None if it never was."""
        for step, similarity in self.curves[method]:
            if similarity >= goal:
                return step
        return None


def races_of(results: Results, methods: Sequence[str]) -> list[Race]:
    """Return the races that all methods finished, in the order of the results.

    Args:
        results: Lines of ``similarity`` with the coordinates ``method``, ``concept``, ``seed`` and ``step``.
        methods: Those that take part.
    """
    races = []
    for (concept, seed), lines in results.select("similarity").by("concept", "seed").items():
        curves: dict[str, list[tuple[int, float]]] = {}
        for (method, step), measured in lines.by("method", "step").items():
            curves.setdefault(str(method), []).append((int(step or 0), measured.lines[0].value))
        if all(method in curves for method in methods):
            races.append(Race(str(concept), int(seed or 0), curves))

    return races


def arrivals(races: Sequence[Race], method: str, baseline: str) -> list[tuple[Race, int, int]]:
    """Return (race, step of the method, step of the baseline) at the baseline's best, where the method gets there."""
    both = []
    for race in races:
        goal = race.best(baseline)
        step = race.arrival(method, goal)

        baseline_step = race.arrival(baseline, goal)
        if step is not None and baseline_step is not None:
            both.append((race, step, baseline_step))

    return both


def timing_figures(
    races: Sequence[Race], methods: Sequence[str], baseline: str, clocks: Mapping[tuple[str, str, int], Clock]
) -> dict[str, dict[str, float | None]]:
    """Return what a clock says of each method.

    Args:
        races: See :func:`races_of`.
        methods: In order.
        baseline: The method whose best similarity is the goal.
        clocks: By method, concept and seed.

    Returns:
        Method to ``seconds_per_step``, ``seconds`` to the goal (mean over the races where it gets there), and
        ``speedup``: how many times faster than the baseline, the ratio of the sums of seconds. None: it never gets
        there. Infinity: it is there before the first step.
    """
    figures: dict[str, dict[str, float | None]] = {}
    for method in methods:
        per_step = []
        for race in races:
            step, seconds = max(clocks[method, race.concept, race.seed].items())
            per_step.append(seconds / max(1, step))

        both = arrivals(races, method, baseline)
        ours = sum(clocks[method, race.concept, race.seed][step] for race, step, _ in both)
        theirs = sum(clocks[baseline, race.concept, race.seed][step] for race, _, step in both)
        figures[method] = {
            "seconds_per_step": summarise(per_step).mean,
            "seconds": ours / len(both) if both else None,
            "speedup": None if not both else (theirs / ours if ours > 0 else float("inf")),
        }

    return figures


def timing_table(figures: Mapping[str, Mapping[str, float | None]], baseline: str) -> str:
    """Return the figures of :func:`timing_figures` as a Markdown table."""
    lines = [
        f"| method | ms per step | seconds to {baseline}'s best similarity | times faster |",
        "|---|---:|---:|---:|",
    ]
    for method, row in figures.items():
        per_step = row["seconds_per_step"]
        assert per_step is not None
        cells = [f"{1000 * per_step:.0f}", _text(row["seconds"]), _text(row["speedup"])]
        lines.append(f"| {method} | {' | '.join(cells)} |")

    note = "Of training alone: drawing the images that similarity is measured on is not timed."
    return "\n".join([*lines, "", note, ""])


def _text(value: float | None) -> str:
    if value is None:
        return "never"
    return "at once" if value == float("inf") else f"{value:.1f}"
