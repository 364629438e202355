"""Across data sets: train on one, then score what was learned on others, without adapting to them."""

from __future__ import annotations

from vlprompt.classification.config import ClassificationConfig, Study
from vlprompt.classification.protocols.base import Protocol
from vlprompt.classification.summary import averages, numbers_by, over_seeds
from vlprompt.experiments.cell import Cell
from vlprompt.experiments.layout import AVERAGE
from vlprompt.experiments.results import Line, Results
from vlprompt.experiments.statistics import Summary, summarise
from vlprompt.experiments.tables import Row

__all__ = ["Across"]


class Across(Protocol):
    """Train k-shot on all classes of a source, then score on targets.

    Cross-dataset transfer to other tasks (Zhou et al., CVPR 2022, section 4.2) and generalisation to other domains of
    the same classes (section 4.3) are the same cells; only the choice of targets differs. Of several sources each is
    trained on by itself, and figures are averages over them. A source that is a target too is not scored on itself.

    Figures are ``source/...`` and ``<target>/...`` for every target, and without prefix the average over the targets,
    which as published leaves the source out; each with ``_std`` and ``_ci95`` over seeds.
    """

    headline = "score"
    metric = "score"

    def cells(self, study: Study) -> list[Cell]:
        """See :meth:`Protocol.cells`."""
        protocol = study.config.protocol
        shots = max(protocol.shots)
        cells = []

        for name in study.config.data.names:
            for seed in protocol.seeds:
                trained = Cell.at(
                    setting=study.setting, method=study.method, data=name, shots=shots, seed=seed
                )
                cells.append(trained)
                for target in protocol.targets:
                    if target != name:
                        cells.append(Cell.at([trained.name], **trained.where, target=target))

        return cells

    def figures(self, results: Results, config: ClassificationConfig) -> dict[str, float]:
        """See :meth:`Protocol.figures`."""
        figures: dict[str, float] = {}
        by_target = self._by_target(results, config)
        for target, by_seed in by_target.items():
            figures |= over_seeds(list(by_seed.values()), f"{target or 'source'}/")
        targets = {target: by_seed for target, by_seed in by_target.items() if target is not None}
        return figures | over_seeds(averages(targets, config.protocol.seeds), "")

    def rows(self, results: Results, study: Study) -> list[Row]:
        """Return ``zero-shot`` and the method; the source's column comes first, the average leaves it out."""
        names = study.config.data.names
        source = f"{names[0]} (source)" if len(names) == 1 else "sources, each on itself"
        by_target = self._by_target(results, study.config)
        rows = []

        for method, metric in (("zero-shot", "zero_shot_score"), (study.method, "score")):
            values: dict[str, float | Summary] = {}
            for target, by_seed in by_target.items():
                scores = [numbers[metric] for numbers in by_seed.values() if metric in numbers]
                if scores:
                    values[target or source] = _summary(scores, spread=metric == "score")

            targets = {target: by_seed for target, by_seed in by_target.items() if target is not None}
            means = [numbers[metric] for numbers in averages(targets, study.config.protocol.seeds)]
            if means:
                values[AVERAGE] = _summary(means, spread=metric == "score")
            rows.append(Row(method, values))

        return [row for row in rows if row.values]

    def comparable(self, results: Results) -> Results:
        """See :meth:`Protocol.comparable`: only targets count, each pair of source and target as a task of its own."""
        lines = []
        for line in super().comparable(results).lines:
            if line.where.get("target") is not None:
                where = {key: value for key, value in line.where.items() if key != "target"}
                where["data"] = f"{line.where['data']} on {line.where['target']}"
                lines.append(Line(where, line.metric, line.value))

        return Results(lines)

    def _by_target(
        self, results: Results, config: ClassificationConfig
    ) -> dict[str | None, dict[int, dict[str, float]]]:
        """Return target (None for the sources themselves) to seed to numbers, averages over the sources."""
        names = config.data.names
        targets = [target for target in config.protocol.targets if names != [target]]
        by_target: dict[str | None, dict[int, dict[str, float]]] = {}

        for target in (None, *targets):
            lines = results.select(target=target)
            by_source = {name: numbers_by(lines.select(data=name)) for name in names if name != target}
            by_seed = {}

            for seed in config.protocol.seeds:
                for numbers in averages(by_source, [seed]):
                    by_seed[seed] = numbers

            by_target[target] = by_seed

        return by_target


def _summary(values: list[float], spread: bool) -> Summary:
    summary = summarise(values)
    return summary if spread else Summary(summary.mean, None, None, summary.n)
