"""Base-to-new generalisation: train on half of the classes, test on each half with its own names only."""

from __future__ import annotations

from collections.abc import Sequence

from vlprompt.classification.config import ClassificationConfig, Study
from vlprompt.classification.protocols.base import Protocol, value_over_seeds
from vlprompt.classification.protocols.few_shot import average_over_data
from vlprompt.classification.summary import numbers_by_data, over_datasets
from vlprompt.core.errors import DataError
from vlprompt.experiments.cell import Cell
from vlprompt.experiments.layout import AVERAGE
from vlprompt.experiments.results import Results
from vlprompt.experiments.statistics import Summary, harmonic_mean
from vlprompt.experiments.tables import Row

__all__ = ["BaseToNew", "split_base_new"]


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


class BaseToNew(Protocol):
    """Train k-shot on the first half of the classes, test on each half.

    Zhou et al., "Conditional prompt learning" (CVPR 2022), section 4.1. The harmonic mean is that of the two mean
    accuracies, as published; its interval comes from the harmonic means of the single seeds. Figures are
    ``base/accuracy``, ``new/accuracy`` and ``harmonic_mean`` with ``_std`` and ``_ci95``; below ``<data set>/`` too if
    there are several, where the overall ``harmonic_mean`` is that of the averages.
    """

    headline = "harmonic_mean"
    metric = "harmonic_mean"

    def cells(self, study: Study) -> list[Cell]:
        """See :meth:`Protocol.cells`."""
        protocol = study.config.protocol
        shots = max(protocol.shots)
        return [
            Cell.at(setting=study.setting, method=study.method, data=name, shots=shots, seed=seed)
            for name in study.config.data.names
            for seed in protocol.seeds
        ]

    def figures(self, results: Results, config: ClassificationConfig) -> dict[str, float]:
        """See :meth:`Protocol.figures`."""
        by_data = numbers_by_data(results, config.data.names)
        figures = over_datasets(by_data, config.protocol.seeds, "")

        for prefix in ("", *(f"{name}/" for name in config.data.names)):
            if f"{prefix}harmonic_mean" in figures:
                base = figures[f"{prefix}base/accuracy"]
                new = figures[f"{prefix}new/accuracy"]
                figures[f"{prefix}harmonic_mean"] = harmonic_mean(base, new)

        return figures

    def gain_metrics(self) -> Sequence[tuple[str | None, str]]:
        """See :meth:`Protocol.gain_metrics`."""
        return [("new", "accuracy")]

    def rows(self, results: Results, study: Study) -> list[Row]:
        """Return ``zero-shot`` and the method: base, new and harmonic mean of every data set, then of the averages."""
        names = study.config.data.names
        rows = []

        for method, metric in (("zero-shot", "zero_shot_accuracy"), (study.method, "accuracy")):
            learned = metric == "accuracy"
            values: dict[str, Summary | None] = {}

            for name in names:
                base = value_over_seeds(results, metric, learned, data=name, part="base")
                new = value_over_seeds(results, metric, learned, data=name, part="new")
                single = value_over_seeds(results, "harmonic_mean", data=name) if learned else None
                values |= _columns(name, base, new, single)

            if len(names) > 1:
                base = average_over_data(results, names, metric, learned, part="base")
                new = average_over_data(results, names, metric, learned, part="new")
                single = average_over_data(results, names, "harmonic_mean") if learned else None
                values |= _columns(AVERAGE, base, new, single)

            rows.append(Row(method, {column: value for column, value in values.items() if value is not None}))

        return [row for row in rows if row.values]


def _columns(
    name: str, base: Summary | None, new: Summary | None, single: Summary | None
) -> dict[str, Summary | None]:
    """Return three columns; the third is the harmonic mean of the means, with the interval of the single seeds."""
    both: Summary | None = None
    if base is not None and new is not None:
        interval = None if single is None else single.ci95
        both = Summary(harmonic_mean(base.mean, new.mean), None, interval, base.n)
    return {f"{name} base": base, f"{name} new": new, f"{name} H": both}
