"""Few-shot learning: train with k images a class, test on all of the test split; CoOp's and ELEVATER's protocols."""

from __future__ import annotations

from collections.abc import Sequence

from vlprompt.classification.config import ClassificationConfig, Study
from vlprompt.classification.protocols.base import Protocol, value_over_seeds
from vlprompt.classification.summary import numbers_by_data, over_datasets
from vlprompt.experiments.cell import Cell
from vlprompt.experiments.layout import AVERAGE, complete_means
from vlprompt.experiments.results import Results
from vlprompt.experiments.statistics import Summary, summarise
from vlprompt.experiments.tables import Row

__all__ = ["Elevater", "FewShot", "average_over_data", "few_shot_figures"]


class FewShot(Protocol):
    """Train k-shot on all classes and test on all classes, for every data set, k and seed.

    Zhou et al., "Learning to prompt for vision-language models" (IJCV 2022), section 4.1. Figures are
    ``shots16/accuracy`` with ``_std`` and ``_ci95`` per k (over the seeds of the average over data sets), the same
    below ``<data set>/`` if there are several, and ``accuracy`` for the largest k.
    """

    always_named = False

    def cells(self, study: Study) -> list[Cell]:
        """See :meth:`Protocol.cells`."""
        protocol = study.config.protocol
        return [
            Cell.at(setting=study.setting, method=study.method, data=name, shots=shots, seed=seed)
            for name in study.config.data.names
            for shots in protocol.shots
            for seed in protocol.seeds
        ]

    def figures(self, results: Results, config: ClassificationConfig) -> dict[str, float]:
        """See :meth:`Protocol.figures`."""
        return few_shot_figures(
            results, config.data.names, config.protocol.shots, config.protocol.seeds, self.always_named
        )

    def rows(self, results: Results, study: Study) -> list[Row]:
        """Return ``zero-shot`` and ``<method> <k>-shot``."""
        names = study.config.data.names
        shots = study.config.protocol.shots
        baseline = f"zero_shot_{self.metric}"
        rows = [Row("zero-shot", _values(results, baseline, names, shots[0], spread=False))]

        for k in shots:
            rows.append(Row(f"{study.method} {k}-shot", _values(results, self.metric, names, k)))
        return [row for row in rows if row.values]


class Elevater(FewShot):
    """Train k-shot on every data set and score each by its own measure; the score is their unweighted mean.

    Li et al., "ELEVATER" (NeurIPS 2022), section 4. Cells are drawn with ``sampling="elevater"``, so k shots are 4/5 k
    to train on and 1/5 k to validate on. The headline is ``score``, and every data set has its own keys.
    """

    headline = "score"
    metric = "score"
    always_named = True


def few_shot_figures(
    results: Results, names: list[str], shots: list[int], seeds: list[int], always_named: bool = False
) -> dict[str, float]:
    """Return the figures of :class:`FewShot` for data sets, numbers of shots and seeds."""
    figures: dict[str, float] = {}
    for k in shots:
        by_data = numbers_by_data(results.select(shots=k), names)
        figures |= over_datasets(by_data, seeds, f"shots{k}/", always_named)

    largest = f"shots{max(shots)}/"

    for prefix in ("", *(f"{name}/" for name in names if always_named)):
        start = f"{prefix}{largest}"
        figures |= {
            f"{prefix}{key.removeprefix(start)}": value
            for key, value in figures.items()
            if key.startswith(start)
        }

    return figures


def average_over_data(
    results: Results, names: Sequence[str], metric: str, spread: bool = True, **where: object
) -> Summary | None:
    """Return a metric's average over the named data sets, summarised over the seeds that all of them have."""
    lines = results.select(metric, **{"part": None, "stage": None, **where})  # type: ignore[arg-type]
    means = list(complete_means(lines, "seed", "data", names).values())
    if not means:
        return None
    summary = summarise(means)
    return summary if spread else Summary(summary.mean, None, None, summary.n)


def _values(
    results: Results, metric: str, names: list[str], shots: int, spread: bool = True
) -> dict[str, float | Summary]:
    """Return a value per data set and their average; of a single data set only itself."""
    values = {name: value_over_seeds(results, metric, spread, data=name, shots=shots) for name in names}
    if len(names) > 1:
        values[AVERAGE] = average_over_data(results.select(shots=shots), names, metric, spread)
    return {column: value for column, value in values.items() if value is not None}
