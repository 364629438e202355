"""Meta-training: one start for prompts, learned from images with captions; figures are on held-out domains."""

from __future__ import annotations

from vlprompt.classification.config import ClassificationConfig, Study
from vlprompt.classification.protocols.base import Protocol
from vlprompt.classification.protocols.few_shot import few_shot_figures
from vlprompt.experiments.cell import Cell
from vlprompt.experiments.results import Results

__all__ = ["MetaTraining"]


class MetaTraining(Protocol):
    """Meta-train once per seed; figures are those of :meth:`vlprompt.meta.learning.MetaPrompts.evaluate`."""

    def cells(self, study: Study) -> list[Cell]:
        """See :meth:`Protocol.cells`."""
        config = study.config
        shots = config.meta.episodes.support
        return [
            Cell.at(
                setting=study.setting, method=study.method, data=config.meta.pairs, shots=shots, seed=seed
            )
            for seed in config.protocol.seeds
        ]

    def figures(self, results: Results, config: ClassificationConfig) -> dict[str, float]:
        """See :meth:`Protocol.figures`."""
        return few_shot_figures(
            results, [config.meta.pairs], [config.meta.episodes.support], config.protocol.seeds
        )
