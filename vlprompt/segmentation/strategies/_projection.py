"""Small networks that turn one kind of vector into another: an MLP, a low-rank map, or one linear layer."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, TypeAlias

import torch
from pydantic import Field
from torch import Tensor, nn

from vlprompt.core.errors import VLPromptError

__all__ = ["Hidden", "Projections", "projection"]

#: Widths between input and output: none, one or several.
Hidden: TypeAlias = (
    Annotated[int, Field(ge=1)] | Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] | None
)

# The start value of a norm's gain. A normed vector has a length of about sqrt(width), the embedding of a token only a
# tenth or a hundredth of it; with a gain of 1 the projection would outweigh the phrase that context starts from.
_GAIN = 0.02


def projection(
    before: int, after: int, hidden: Hidden, *, low_rank: bool = False, norm: bool = True, bias: bool = True
) -> nn.Sequential:
    """Build a network from (..., before) to (..., after).

    Args:
        before: Width of the input.
        after: Width of the output.
        hidden: Widths of the layers between.
        low_rank: Two linear layers without activation; ``hidden`` is then the rank.
        norm: Norm the output, instead of a bias of the last linear layer.
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
        widths = [before, *_listed(hidden)]
        layers = []

        for width_in, width_out in pairwise(widths):
            linear = nn.Linear(width_in, width_out)
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
            layers += [linear, nn.ReLU()]

        layers.append(nn.Linear(widths[-1], after, bias=last))

    if norm:
        layer_norm = nn.LayerNorm(after, bias=bias)
        nn.init.constant_(layer_norm.weight, _GAIN)
        layers.append(layer_norm)

    return nn.Sequential(*layers)


def _listed(hidden: Hidden) -> list[int]:
    """Return widths as a list."""
    if hidden is None:
        return []
    return [hidden] if isinstance(hidden, int) else list(hidden)


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
