"""R1: every number of the gradient has a factor of its own, as in Meta-SGD (Li et al. 2017, arXiv 1707.09835)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vlprompt.meta.regulators import REGULATORS, Regulator, Situation, key_of

__all__ = ["Diagonal"]


@REGULATORS.register("diagonal", summary="R1: a factor per number, 1 at the start", paper="1707.09835")
class Diagonal(Regulator):
    """R(g) = s * g. The factors are free to change their sign.

    Args:
        shapes: See :class:`Regulator`.
        dim: See there.
    """

    only_scales = True

    def __init__(self, shapes: Mapping[str, torch.Size], dim: int) -> None:
        super().__init__(shapes, dim)
        self.scale = nn.ParameterDict({key_of(n): nn.Parameter(torch.ones(s)) for n, s in shapes.items()})

    def regulate_one(self, name: str, gradient: Tensor, situation: Situation) -> Tensor:
        """See :meth:`Regulator.regulate_one`."""
        return self.scale[key_of(name)] * gradient
