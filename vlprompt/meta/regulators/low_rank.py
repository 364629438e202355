"""R2: each row of the gradient plus a low-rank linear function of itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from vlprompt.core.seeding import torch_rng
from vlprompt.meta.regulators import REGULATORS, Regulator, Situation, key_of

__all__ = ["LowRank"]


@REGULATORS.register("low_rank", summary="R2: row by row g + U V g, U = 0 at the start")
class LowRank(Regulator):
    """R(g) = g + U (V g) for every row g (a prompt token, W numbers); all rows of a tensor share U and V.

    Args:
        shapes: See :class:`Regulator`.
        dim: See there.
        rank: r, of U (W, r) and V (r, W).
        seed: Of V's start, N(0, 1 / W).
    """

    def __init__(
        self,
        shapes: Mapping[str, torch.Size],
        dim: int,
        *,
        rank: Annotated[int, Field(ge=1)] = 16,
        seed: int = 1,
    ) -> None:
        super().__init__(shapes, dim)
        widths = {key_of(name): shape[-1] for name, shape in shapes.items()}

        self.up = nn.ParameterDict({k: nn.Parameter(torch.zeros(w, rank)) for k, w in widths.items()})
        self.down = nn.ParameterDict(
            {
                k: nn.Parameter(torch.randn(rank, w, generator=torch_rng(seed, "low rank", k)) / w**0.5)
                for k, w in widths.items()
            }
        )

    def regulate_one(self, name: str, gradient: Tensor, situation: Situation) -> Tensor:
        """See :meth:`Regulator.regulate_one`."""
        return gradient + gradient @ self.down[key_of(name)].T @ self.up[key_of(name)].T
