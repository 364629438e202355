"""The recipe of a method: the training options of its paper, and how they are found on another backbone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["PAPER_BACKBONES", "Recipe"]

PAPER_BACKBONES = frozenset({"ViT-B-16", "ViT-B-32", "ViT-L-14", "RN50", "RN101"})
"""The CLIP backbones of the papers, with OpenAI's weights; their rates are known to fit these only."""


@dataclass(frozen=True)
class Recipe:
    """How a method is trained where nobody says how.

    Attributes:
        train: Training options of the paper (see ``TrainOptions``); without ``epochs`` the paper's depend on the shots.
        epochs_by_shots: Pairs (shots per class, epochs), rising: the last pair that the shots reach counts.
        steps_per_shot: Optimiser steps for each shot per class, where the paper counts steps instead of epochs.
        factors: What the paper's rate is multiplied by on another backbone; the best is chosen on held-back shots. One
            factor: nothing is searched.
        steps: Optimiser steps of the training on another backbone.
        trial_steps: Optimiser steps of each trial of the search.
    """

    train: Mapping[str, Any] = field(default_factory=dict)
    epochs_by_shots: tuple[tuple[int, int], ...] = ()
    steps_per_shot: int | None = None
    factors: tuple[float, ...] = (1.0, 10.0, 100.0, 1000.0)
    steps: int = 200
    trial_steps: int = 60

    def paper_options(self, shots: int) -> dict[str, Any]:
        """Return the paper's options.

        Args:
            shots: Training images of a class; of the largest one, where they differ.
        """
        options = dict(self.train)
        if self.steps_per_shot is not None:
            options["steps"] = self.steps_per_shot * shots
        for least, epochs in self.epochs_by_shots:
            if shots >= least or "epochs" not in options:
                options["epochs"] = epochs
        return options
