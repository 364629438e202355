"""A repository of visual prompts that images look up by similarity, and what keeps its prompts apart.

Papers: VAPS, arXiv 2502.20292 (keys and prompts, looked up by cosine), extended by DBOM, arXiv 2508.01932, with a
separation and a diversity loss. Neither has public code; forms and defaults here are a reconstruction.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlprompt.core.seeding import torch_rng

__all__ = ["Bank", "Lookup", "decomposition", "diversity", "separation", "start_at_zero"]


class Bank(nn.Module):
    """M prompts with a key each.

    Args:
        count: M.
        query_width: Width of keys and queries.
        width: d, width of a prompt.
        length: Vectors per prompt; a looked-up prompt is their mean.
        top: k, prompts that a query takes.
        purpose: What it is for, part of the seed.
        seed: Of keys, U(-1, 1), and prompts, N(0, 0.02^2).
    """

    def __init__(
        self, count: int, query_width: int, width: int, *, length: int, top: int, purpose: str, seed: int
    ) -> None:
        super().__init__()
        self.top = min(top, count)

        generator = torch_rng(seed, "bank", purpose)
        keys = torch.rand(count, query_width, generator=generator) * 2 - 1
        self.keys = nn.Parameter(F.normalize(keys, dim=-1))
        self.prompts = nn.Parameter(0.02 * torch.randn(count, length, width, generator=generator))

    @property
    def means(self) -> Tensor:
        """(M, d), every prompt as one vector."""
        return self.prompts.mean(1)

    def forward(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Look prompts up.

        The k best prompts are averaged by the softmax of their similarities, so that with k > 1 keys also learn from
        what prompts are good for.

        Args:
            queries: (B, query_width); no gradient flows into them.

        Returns:
            (B, d) prompts, and the mean distance 1 - cosine between queries and the keys they took.
        """
        similarity = F.normalize(queries.detach(), dim=-1) @ F.normalize(self.keys, dim=-1).T
        best, chosen = similarity.topk(self.top, dim=-1)

        shares = (10 * best).softmax(-1)[..., None]
        prompts = (shares * self.means[chosen]).sum(1)
        return prompts, (1 - best).mean()


def separation(first: Tensor, second: Tensor, bank: Tensor, other: Tensor) -> Tensor:
    """Return how parallel two kinds of prompts are: 0 if they are orthogonal.

    Args:
        first: (B, d) prompts of one kind that images looked up.
        second: (B, d) of the other kind, for the same images.
        bank: (M, d), all prompts of the first kind.
        other: (N, d), all of the second.
    """
    looked_up = F.cosine_similarity(first, second, dim=-1).square().mean()
    whole_banks = (F.normalize(bank, dim=-1) @ F.normalize(other, dim=-1).T).square().mean()
    return looked_up + whole_banks


def diversity(bank: Tensor) -> Tensor:
    """Return the mean squared cosine between different rows of (M, d): 1 if all are equal, 0 if orthogonal."""
    count = len(bank)
    if count < 2:
        return bank.sum() * 0  # zero, with a gradient

    unit = F.normalize(bank, dim=-1)
    cosines = (unit @ unit.T).square()
    return (cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1))


@dataclass(frozen=True)
class Lookup:
    """What a batch took from the repository.

    Attributes:
        trigger: The (B, d) prompt of the trigger's side, as a list of one; empty without a repository.
        object: The (B, d) prompt of the object's side, likewise.
        losses: By name.
    """

    trigger: list[Tensor] = field(default_factory=list)
    object: list[Tensor] = field(default_factory=list)
    losses: dict[str, Tensor] = field(default_factory=dict)


def start_at_zero(layer: Any) -> None:
    """Let a linear layer add nothing at first."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


def decomposition(inputs: int, hidden: int, width: int, dropout: float) -> nn.Sequential:
    """Return a network of one hidden layer that takes one side, trigger or object, out of what it is given."""
    return nn.Sequential(
        nn.Linear(inputs, hidden),
        nn.LayerNorm(hidden),
        nn.GELU(),
        nn.Dropout(dropout),
        nn.Linear(hidden, width),
    )
