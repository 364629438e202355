"""Small networks that turn one kind of vector into another: an MLP, a low-rank map, or one linear layer."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, TypeAlias

import torch
from pydantic import Field
from torch import Tensor, nn

from vlprompt.core.errors import VLPromptError

__all__ = ["Hidden", "Projections", "projection"]

#: Widths between the two ends: none, one or several.
Hidden: TypeAlias = (
    Annotated[int, Field(ge=1)] | Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] | None
)

# A normed vector has a length of about sqrt(width), a token's embedding one of about a tenth or a hundredth of it:
# what a norm's gain starts from, lest it drown the phrase that context starts from.
_GAIN = 0.02


def projection(
    before: int, after: int, hidden: Hidden, *, low_rank: bool = False, norm: bool = True, bias: bool = True
) -> nn.Sequential:
    """Build a network from (..., before) to (..., after).

    Args:
        before: Width of what goes in.
        after: Width of what comes out.
        hidden: Widths of the layers between.
        low_rank: Two linear layers without activation; ``hidden`` is then the rank.
        norm: Norm what comes out, in place of the last linear layer's bias.
        bias: Whether the last layer (linear or norm) has a bias.

    Raises:
        VLPromptError: If a low-rank map has no single rank.
    """
    last = bias and not norm
    if low_rank:
        if not isinstance(hidden, int):
            raise VLPromptError(f"low_rank needs one number as rank (intermediate_dim), got {hidden!r}.")
        wide = hidden > after
        layers: list[nn.Module] = [nn.Linear(before, after if wide else hidden, bias=False)]
        layers += [] if wide else [nn.Linear(hidden, after, bias=last)]
    else:
        between = [] if hidden is None else [hidden] if isinstance(hidden, int) else list(hidden)
        layers = []
        for a, b in pairwise([before, *between]):
            layers += [nn.Linear(a, b), nn.ReLU()]
            nn.init.kaiming_normal_(layers[-2].weight, nonlinearity="relu")  # type: ignore[arg-type]
        layers.append(nn.Linear(([before, *between])[-1], after, bias=last))
    if norm:
        layers.append(nn.LayerNorm(after, bias=bias))
        nn.init.constant_(layers[-1].weight, _GAIN)  # type: ignore[arg-type]
    return nn.Sequential(*layers)


class Projections(nn.Module):
    """One network per row of prompts, or one for all.

    Args:
        networks: As many as rows, or one.
    """

    def __init__(self, networks: list[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, rows: Tensor) -> Tensor:
        """Return (J, ..., W') of (J, ..., W) rows."""
        if len(self.networks) == 1:
            return self.networks[0](rows)
        return torch.stack([network(row) for network, row in zip(self.networks, rows, strict=True)])
