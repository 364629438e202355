"""What every protocol is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from vlprompt.classification.config import ClassificationConfig, Study
from vlprompt.experiments.cell import Cell
from vlprompt.experiments.gains import paired_gains
from vlprompt.experiments.results import Results
from vlprompt.experiments.statistics import Summary, summarise
from vlprompt.experiments.tables import Row

__all__ = ["MEASURES", "SCRATCH", "Protocol", "measured_gains", "value_over_seeds"]

SCRATCH = "scratch"
MEASURES = ("accuracy", "score")  # a data set's own measure may be another than accuracy


class Protocol(ABC):
    """Plans the cells of a study and computes its figures from the long table.

    Attributes:
        headline: Key of ``metrics.json`` that is said first.
        metric: What tables and gains are of.
    """

    headline: str = "accuracy"
    metric: str = "accuracy"

    @abstractmethod
    def cells(self, study: Study) -> list[Cell]:
        """Return the cells of a study, without those that it is compared with from scratch."""

    @abstractmethod
    def figures(self, results: Results, config: ClassificationConfig) -> dict[str, float]:
        """Return flat figures of the lines of one stage of a study."""

    def rows(self, results: Results, study: Study) -> list[Row]:
        """Return the study's lines of a table as papers print it; empty if the protocol has no such table."""
        return []

    def planned(self, study: Study) -> list[Cell]:
        """Return all cells of a study, those from scratch included."""
        cells = self.cells(study)
        if study.config.target.compare_scratch:
            cells += [cell.sibling(stage=SCRATCH) for cell in self.cells(study)]
        return cells

    def summary(self, results: Results, study: Study) -> dict[str, float]:
        """Return the study's figures: its own, those from scratch, and the gains over them."""
        lines = results.select(stage=None)
        figures = self.figures(lines, study.config)

        if study.config.target.compare_scratch:
            scratch = results.select(stage=SCRATCH)
            below = self.figures(scratch, study.config)
            figures |= {f"{SCRATCH}/{key}": value for key, value in below.items()}
            figures |= measured_gains(lines, scratch, self.gain_metrics())

        return figures

    def gain_metrics(self) -> Sequence[tuple[str | None, str]]:
        """Return (part, metric) of everything that gains over scratch are computed of."""
        return [(None, metric) for metric in MEASURES]

    def comparable(self, results: Results) -> Results:
        """Return the lines that methods are compared by, one for each method, task, number of shots and seed."""
        return results.select(self.metric, stage=None, part=None)


def measured_gains(
    ours: Results, theirs: Results, measures: Sequence[tuple[str | None, str]]
) -> dict[str, float]:
    """Return the paired gains in every measure that all cells have; the score only where it says something new."""
    flat: dict[str, float] = {}
    values: list[list[float]] = []

    for part, metric in measures:
        mine = ours.select(metric, part=part)
        other = theirs.select(metric, part=part)
        if not mine or not other:
            continue
        if [*mine.values(), *other.values()] in values:
            continue

        values.append([*mine.values(), *other.values()])
        flat |= paired_gains(mine, other, f"{part}/{metric}" if part else metric)

    return flat


def value_over_seeds(results: Results, metric: str, spread: bool = True, **where: Any) -> Summary | None:
    """Return a metric's summary over seeds at some coordinates; None if it was not measured there.

    Args:
        results: Lines of one method.
        metric: Its name.
        spread: Whether it depends on the seed. Zero-shot does not: one number, without an interval.
        **where: Further coordinates; ``part`` and ``stage`` are None unless they are named.
    """
    lines = results.select(metric, **{"part": None, "stage": None, **where})
    values = list(lines.value_by("seed").values())
    if not values:
        return None
    summary = summarise(values)
    return summary if spread else Summary(summary.mean, None, None, summary.n)
