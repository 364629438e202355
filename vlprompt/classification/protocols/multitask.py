"""Several tasks, one set of prompts; then target tasks from those prompts, beside the same from scratch.

Paper: Shen et al., "Multitask Vision-Language Prompt Tuning", arXiv 2211.11720, section 4.
"""

from __future__ import annotations

from vlprompt.classification.config import ClassificationConfig, Study
from vlprompt.classification.protocols.base import MEASURES, SCRATCH, Protocol, measured_gains
from vlprompt.classification.protocols.few_shot import few_shot_figures
from vlprompt.classification.summary import numbers_by, over_datasets
from vlprompt.experiments.cell import Cell
from vlprompt.experiments.results import Results

__all__ = ["SOURCE", "TARGET", "MultiTaskProtocol", "groups_of", "shots_of_source"]

SOURCE = "source"
TARGET = "target"


class MultiTaskProtocol(Protocol):
    """Train groups of data sets together; then, if configured, targets from their prompts, and all from scratch.

    Figures: with targets, theirs without prefix and the source's below ``source/``; without, the groups' figures.
    ``scratch/`` and ``gain/`` (see :func:`paired_gains`) if a comparison was asked for.
    """

    def cells(self, study: Study) -> list[Cell]:
        """See :meth:`Protocol.cells`."""
        protocol = study.config.protocol
        target = study.config.target
        study_coordinates = {"setting": study.setting, "method": study.method}
        cells = [
            Cell.at(**study_coordinates, stage=SOURCE, group=group, shots=shots, seed=seed)
            for group in groups_of(study.config)
            for shots in protocol.shots
            for seed in protocol.seeds
        ]

        for name in target.names:
            for shots in target.shots or protocol.shots:
                for seed in protocol.seeds:
                    needed = self.origins(study, shots, seed)
                    names = [cell.name for cell in needed]
                    cells.append(
                        Cell.at(names, **study_coordinates, stage=TARGET, data=name, shots=shots, seed=seed)
                    )

        return cells

    def origins(self, study: Study, shots: int, seed: int) -> list[Cell]:
        """Return the source cells whose prompts a target starts from."""
        config = study.config
        seeds = [seed] if config.target.start == "seed" else config.protocol.seeds
        from_shots = shots_of_source(config, shots)
        study_coordinates = {"setting": study.setting, "method": study.method}
        return [
            Cell.at(**study_coordinates, stage=SOURCE, group=group, shots=from_shots, seed=s)
            for group in groups_of(config)
            for s in seeds
        ]

    def planned(self, study: Study) -> list[Cell]:
        """See :meth:`Protocol.planned`."""
        cells = self.cells(study)
        if study.config.target.compare_scratch:
            for name in self._compared(study.config):
                for shots in study.config.target.shots or study.config.protocol.shots:
                    for seed in study.config.protocol.seeds:
                        coordinates = {"setting": study.setting, "method": study.method, "stage": SCRATCH}
                        cells.append(Cell.at(**coordinates, data=name, shots=shots, seed=seed))

        return cells

    def figures(self, results: Results, config: ClassificationConfig) -> dict[str, float]:
        """See :meth:`Protocol.figures`: those of the targets."""
        shots = config.target.shots or config.protocol.shots
        return few_shot_figures(results, config.target.names, shots, config.protocol.seeds)

    def summary(self, results: Results, study: Study) -> dict[str, float]:
        """See :meth:`Protocol.summary`."""
        config = study.config
        source = results.select(stage=SOURCE)
        source_figures = _source_figures(source, config)

        if config.target.names:
            figures = self.figures(results.select(stage=TARGET), config)
            figures |= {f"{SOURCE}/{key}": value for key, value in source_figures.items()}
        else:
            figures = source_figures

        if not config.target.compare_scratch:
            return figures

        scratch = results.select(stage=SCRATCH)
        names = self._compared(config)
        shots = config.target.shots or config.protocol.shots
        below = few_shot_figures(scratch, names, shots, config.protocol.seeds)
        figures |= {f"{SCRATCH}/{key}": value for key, value in below.items()}
        measures = [(None, metric) for metric in MEASURES]

        if config.target.names:
            return figures | measured_gains(results.select(stage=TARGET), scratch, measures)

        groups = groups_of(config)
        for group, members in groups.items():
            lines = source.select(group=group, data=members)
            gains = measured_gains(lines, scratch.select(data=members), measures)
            figures |= {f"{group}/{key}" if len(groups) > 1 else key: value for key, value in gains.items()}

        return figures

    def comparable(self, results: Results) -> Results:
        """See :meth:`Protocol.comparable`."""
        return results.select(self.metric, stage=TARGET, part=None)

    def _compared(self, config: ClassificationConfig) -> list[str]:
        """Return the data sets that are trained from scratch too."""
        if config.target.names:
            return list(config.target.names)
        return list(dict.fromkeys(name for members in groups_of(config).values() for name in members))


def groups_of(config: ClassificationConfig) -> dict[str, list[str]]:
    """Return group to its data sets; one group of all where none are configured."""
    return dict(config.multitask.groups) or {SOURCE: config.data.names}


def shots_of_source(config: ClassificationConfig, shots: int) -> int:
    """Return the number of shots of the source cells that a target of so many shots starts from."""
    return shots if shots in config.protocol.shots else max(config.protocol.shots)


def _source_figures(results: Results, config: ClassificationConfig) -> dict[str, float]:
    """Return the figures of groups: means over tasks, and each task's own below ``<task>/``."""
    groups = groups_of(config)
    figures: dict[str, float] = {}

    for shots in config.protocol.shots:
        by_group = {}
        for group in groups:
            lines = results.select(group=group, shots=shots)
            by_seed = numbers_by(lines.select(data=None))
            for name in groups[group]:
                for seed, numbers in numbers_by(lines.select(data=name)).items():
                    by_seed[seed] |= {f"{name}/{metric}": value for metric, value in numbers.items()}
            by_group[group] = by_seed
        figures |= over_datasets(by_group, config.protocol.seeds, f"shots{shots}/")

    start = f"shots{max(config.protocol.shots)}/"
    largest = {key.removeprefix(start): value for key, value in figures.items() if key.startswith(start)}
    return figures | largest
