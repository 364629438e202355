"""Class-incremental learning: the classes come in sessions, and a session's images name no other session's classes.

Protocols as in De Min et al., arXiv 2405.15633, section 4.1, and Dong et al., "Knowledge Restore and Transfer for
Multi-Label Class-Incremental Learning", ICCV 2023, section 4.1: "Bb-Ck" is a first session of b classes, then k at a
time; "B0-Ck" is k at a time from the start.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from vlprompt.classification.config import ClassificationConfig, Study
from vlprompt.classification.protocols.base import Protocol, value_over_seeds
from vlprompt.classification.summary import numbers_by, numbers_by_data, over_datasets, over_seeds
from vlprompt.core.errors import DataError
from vlprompt.core.seeding import numpy_rng
from vlprompt.experiments.cell import Cell
from vlprompt.experiments.results import Results
from vlprompt.experiments.statistics import Summary
from vlprompt.experiments.tables import Row

__all__ = ["FIXED", "ClassIncremental", "session_classes"]

FIXED = "fixed"
"""The part of the figures that are on all test images; the others are on those that show a class seen so far."""

_COLUMNS = ("last", "average", "forgetting")


def session_classes(
    classnames: Sequence[str], split: str, order: str, seed: int, name: str
) -> list[tuple[int, ...]]:
    """Return the class indices of every session.

    Args:
        classnames: C names.
        split: ``"Bb-Ck"``, or ``"joint"``: one session of all classes.
        order: ``"seeded"``: a permutation for each seed; ``"alphabetical"``.
        seed: Of the permutation.
        name: Of the data set, which the permutation depends on too.

    Raises:
        DataError: If a session would have fewer than two classes, or the first all of them.
    """
    count = len(classnames)
    places = sorted(range(count), key=lambda c: classnames[c].casefold())
    if order == "seeded":
        places = [int(c) for c in numpy_rng(seed, "class order", name).permutation(count)]
    if split == "joint":
        return [tuple(places)]

    base, step = (int(number) for number in re.fullmatch(r"B(\d+)-C(\d+)", split).groups())  # type: ignore[union-attr]
    if (base or step) >= count:
        raise DataError(f"{name} has {count} classes, so that {split} leaves none for a second session.")

    borders = [*([base] if base else []), *range(base + step, count, step), count]
    sessions = [tuple(places[i:j]) for i, j in zip([0, *borders], borders, strict=False)]
    small = [number for number, session in enumerate(sessions, 1) if len(session) < 2]
    if small:
        raise DataError(
            f"{split} cuts the {count} classes of {name} so that session {small[0]} has {len(sessions[small[0] - 1])}; "
            "every session needs two at least."
        )
    return sessions


class ClassIncremental(Protocol):
    """Learn the sessions one after the other, and score all classes seen so far after each.

    A cell is a whole course of sessions. Figures, each with ``_std`` and ``_ci95`` over the seeds, which are orders of
    the classes too: ``last``, the measure of all classes after the last session; ``average`` over all sessions;
    ``forgetting`` and ``backward_transfer`` (see :mod:`vlprompt.metrics.incremental`); ``session1/score`` and so on.
    The measure is mean average precision where images have several labels, else accuracy. They are on the test images
    that show a class seen so far; of several labels also, below ``fixed/``, on all test images.
    """

    headline = "last"
    metric = "last"

    def cells(self, study: Study) -> list[Cell]:
        """See :meth:`Protocol.cells`."""
        return [
            Cell.at(setting=study.setting, method=study.method, data=name, seed=seed)
            for name in study.config.data.names
            for seed in study.config.protocol.seeds
        ]

    def figures(self, results: Results, config: ClassificationConfig) -> dict[str, float]:
        """See :meth:`Protocol.figures`."""
        names = config.data.names
        by_data = numbers_by_data(results.select(session=None), names)
        figures = over_datasets(by_data, config.protocol.seeds, "")

        after_each = results.select(session=lambda session: session is not None, of=None)
        for session in after_each.coordinates("session"):
            for name in names:
                prefix = f"{name}/" if len(names) > 1 else ""
                lines = after_each.select(session=session, data=name)
                figures |= over_seeds(list(numbers_by(lines).values()), f"{prefix}session{session}/")
        return figures

    def rows(self, results: Results, study: Study) -> list[Row]:
        """Return ``zero-shot`` and the method: last, average and forgetting of every data set."""
        rows = []
        for method, prefix in (("zero-shot", "zero_shot_"), (study.method, "")):
            values: dict[str, Summary | None] = {}
            for name in study.config.data.names:
                for metric in _COLUMNS:
                    values[f"{name} {metric}"] = _value(results, f"{prefix}{metric}", name)
            rows.append(Row(method, {column: value for column, value in values.items() if value is not None}))
        return [row for row in rows if row.values]

    def comparable(self, results: Results) -> Results:
        """See :meth:`Protocol.comparable`."""
        return super().comparable(results).select(session=None)


def _value(results: Results, metric: str, data: str) -> Summary | None:
    """Return a figure of whole courses; forgetting is that on all test images, which no new image can feign."""
    part = FIXED if results.select(metric, data=data, part=FIXED) and metric == "forgetting" else None
    return value_over_seeds(results, metric, data=data, session=None, part=part)
