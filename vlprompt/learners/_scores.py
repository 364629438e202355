"""The scores of binary masks: how they become masks and weights, and how they are stored."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vlprompt.backbones.reweighted import Reweight
from vlprompt.backbones.weight_masks import masked_weight, pack, unpack

__all__ = ["MaskScores"]


class MaskScores(nn.ParameterDict):
    """One score per weight; a weight is on where its score is above the threshold, and all are on at first.

    Args:
        weights: Frozen weights by their names in the image tower.
        init: Score that every weight starts from.
        threshold: At most this score switches a weight off.
    """

    def __init__(self, weights: Mapping[str, Tensor], init: float, threshold: float) -> None:
        super().__init__(
            {self.key(name): torch.full_like(w, init, dtype=torch.float32) for name, w in weights.items()}
        )
        self.names = tuple(weights)
        self.init = init
        self.threshold = threshold

    @staticmethod
    def key(name: str) -> str:
        """Return the parameter's name for a weight's, which can't hold a dot."""
        return name.replace(".", "/")

    def of(self, name: str) -> nn.Parameter:
        """Return the scores of a weight."""
        return self[self.key(name)]

    def use(self) -> dict[str, Reweight]:
        """Return, for every weight, the function that masks it."""
        return {name: functools.partial(self._mask, name) for name in self.names}

    def masks(self) -> dict[str, Tensor]:
        """Return the boolean masks; False is off."""
        return {name: self.of(name).detach() > self.threshold for name in self.names}

    def all_on(self) -> bool:
        """Whether no weight is switched off."""
        return all(bool(score.detach().amin() > self.threshold) for score in self.values())

    def is_fixed(self, name: str) -> bool:
        """Whether a weight stays as it is: its scores don't learn, and all of it is on."""
        score = self.of(name)
        return not score.requires_grad and bool(score.detach().amin() > self.threshold)

    def packed(self) -> dict[str, Tensor]:
        """Return the masks, 8 weights to a byte, by parameter."""
        return {self.key(name): pack(mask) for name, mask in self.masks().items()}

    def load_packed(self, bits: Mapping[str, Tensor]) -> None:
        """Put masks back; scores become ``init`` where a weight is on, 0 where it is off."""
        with torch.no_grad():
            for key, score in self.items():
                score.copy_(self.init * unpack(bits[key], score.shape).to(score))

    def load_scores(self, scores: Mapping[str, Tensor]) -> None:
        """Put the scores themselves back."""
        with torch.no_grad():
            for key, score in self.items():
                score.copy_(scores[key])

    def _mask(self, name: str, weight: Tensor) -> Tensor:
        return masked_weight(weight, self.of(name), self.threshold)
