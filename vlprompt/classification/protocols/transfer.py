"""Which task's prompts help which: every task from scratch, and from every task's prompts.

Paper: Shen et al., "Multitask Vision-Language Prompt Tuning", arXiv 2211.11720, section 4.3.
"""

from __future__ import annotations

import numpy as np

from vlprompt.classification.config import ClassificationConfig, Study
from vlprompt.classification.protocols.base import SCRATCH, Protocol
from vlprompt.classification.protocols.few_shot import few_shot_figures
from vlprompt.classification.transfer_matrix import TransferMatrix
from vlprompt.experiments.cell import Cell
from vlprompt.experiments.results import Results
from vlprompt.experiments.statistics import summarise

__all__ = ["Transfer", "matrix_of"]


class Transfer(Protocol):
    """Tune every task from every task's prompts: a matrix of relative gains over starting from scratch.

    A source prompt and what is tuned from it share a seed. The diagonal, a task tuned again from its own prompt, is the
    control: what a second round of training alone is worth.
    """

    headline = "mean_gain_accuracy"

    def cells(self, study: Study) -> list[Cell]:
        """See :meth:`Protocol.cells`."""
        config = study.config
        coordinates = {"setting": study.setting, "method": study.method, "shots": max(config.protocol.shots)}
        cells = []

        for name in config.data.names:
            for seed in config.protocol.seeds:
                cells.append(Cell.at(**coordinates, stage=SCRATCH, data=name, seed=seed))

        for source in config.data.names:
            for name in config.data.names:
                for seed in config.protocol.seeds:
                    origin = Cell.at(**coordinates, stage=SCRATCH, data=source, seed=seed)
                    cells.append(
                        Cell.at(
                            [origin.name], **coordinates, stage="from", source=source, data=name, seed=seed
                        )
                    )

        return cells

    def planned(self, study: Study) -> list[Cell]:
        """See :meth:`Protocol.planned`: starting from scratch is part of the protocol."""
        return self.cells(study)

    def figures(self, results: Results, config: ClassificationConfig) -> dict[str, float]:
        """See :meth:`Protocol.figures`."""
        return few_shot_figures(
            results, config.data.names, [max(config.protocol.shots)], config.protocol.seeds
        )

    def summary(self, results: Results, study: Study) -> dict[str, float]:
        """See :meth:`Protocol.summary`."""
        parts = {SCRATCH: results.select(stage=SCRATCH)}
        for source in study.config.data.names:
            parts[f"from-{source.replace('/', '-')}"] = results.select(stage="from", source=source)

        figures: dict[str, float] = {}

        for name, lines in parts.items():
            numbers = self.figures(lines, study.config)
            figures |= {f"{name}/{key}": value for key, value in numbers.items()}

        return figures | matrix_of(results, study.config).metrics()


def matrix_of(results: Results, config: ClassificationConfig) -> TransferMatrix:
    """Return the matrix of a finished study; what is missing is NaN."""
    names = config.data.names
    scratch = [_mean(results.select(stage=SCRATCH), name) for name in names]
    rows = [[_mean(results.select(stage="from", source=source), name) for name in names] for source in names]
    return TransferMatrix(tuple(names), np.array(scratch), np.array(rows).reshape(len(names), len(names)))


def _mean(results: Results, name: str) -> float:
    """Return the mean over seeds of a task's own measure (mostly accuracy), NaN if there is none."""
    values = results.select("score", data=name, part=None).values()
    return summarise(values).mean if values else float("nan")
