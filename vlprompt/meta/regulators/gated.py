"""R3: a gate between the gradient and a transformed one, opened by what the images look like.

After SUPMER (Pan et al., EMNLP Findings 2023, arXiv 2303.12314), whose authors' code does it for T5. Differs from that
code where it is wrong: the transform's last layer is linear; theirs ends in a clamp at 0, so that no number could ever
turn negative. The transform reads directions, and the gate CLIP's image feature instead of an encoder's hidden states.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vlprompt.core.errors import DataError
from vlprompt.core.seeding import seeded_modules
from vlprompt.meta.regulators import REGULATORS, Regulator, Situation, key_of

__all__ = ["Gated"]

_OPEN = 2.0  # the gate's first bias: most of the plain gradient passes, sigmoid(2) = 0.88


@REGULATORS.register(
    "gated", summary="R3: plain and transformed gradient, mixed by a gate on the images", paper="2303.12314"
)
class Gated(Regulator):
    """R(g) = (1 - c) T(g) + c g row by row, with T(g) rescaled to the length of g and c in (0, 1).

    Args:
        shapes: See :class:`Regulator`.
        dim: See there.
        rank: Width of T's hidden layer.
        hidden: Width of the gate's.
        agreement: Weight of the loss that teaches the gate: c should be the mean of how alike the two domains are and
            of how well the regulated gradient fits the query's, both in [0, 1].
        seed: Of the start.
    """

    needs_features = True

    def __init__(
        self,
        shapes: Mapping[str, torch.Size],
        dim: int,
        *,
        rank: Annotated[int, Field(ge=1)] = 16,
        hidden: Annotated[int, Field(ge=1)] = 24,
        agreement: Annotated[float, Field(ge=0)] = 1.0,
        seed: int = 1,
    ) -> None:
        super().__init__(shapes, dim)
        self.agreement = agreement

        with seeded_modules(seed, "gated regulator"):
            self.transform = nn.ModuleDict(
                {key_of(n): _two_layers(s[-1], rank, s[-1]) for n, s in shapes.items()}
            )
            self.gate = _two_layers(dim, hidden, 1)
        nn.init.constant_(self.gate[-1].bias, _OPEN)  # type: ignore[arg-type]  # the last layer is linear

    def openness(self, situation: Situation) -> Tensor:
        """Return c, how much of the plain gradient passes."""
        if situation.features is None:
            raise DataError("the regulator 'gated' needs the images' mean feature, and none was given.")
        return self.gate(situation.features).sigmoid().squeeze(-1)

    def regulate_one(self, name: str, gradient: Tensor, situation: Situation) -> Tensor:
        """See :meth:`Regulator.regulate_one`."""
        other = F.normalize(self.transform[key_of(name)](_unit_rows(gradient)), dim=-1)
        other = other * gradient.norm(dim=-1, keepdim=True)
        c = self.openness(situation)
        return (1 - c) * other + c * gradient

    def auxiliary(
        self,
        regulated: Mapping[str, Tensor],
        query: Mapping[str, Tensor],
        similarity: float,
        situation: Situation,
    ) -> Tensor | None:
        """See :meth:`Regulator.auxiliary`."""
        if not self.agreement:
            return None
        rows = [F.cosine_similarity(query[n], regulated[n].detach(), dim=-1).flatten() for n in self.shapes]
        fits = (1 + torch.cat(rows).mean()) / 2
        target = ((1 + similarity) / 2 + fits) / 2
        return self.agreement * (target.detach() - self.openness(situation)).square()


def _two_layers(inner: int, hidden: int, outer: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inner, hidden), nn.ReLU(), nn.Linear(hidden, outer))


def _unit_rows(gradient: Tensor) -> Tensor:
    """Gradients are tiny or large with the loss; their direction is what the transform reads."""
    return gradient / gradient.norm(dim=-1, keepdim=True).clamp(min=1e-30)
