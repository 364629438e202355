"""CLIPSeg's decoder: tokens of three blocks, reduced, summed from deep to shallow, and modulated by a phrase.

Lüddecke and Ecker, CVPR 2022, arXiv 2112.10003, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from vlprompt.segmentation._fine import FineUpsampling, likeness

__all__ = ["FilmDecoder"]


class FilmDecoder(nn.Module):
    """Reduced token states and a phrase's feature to logits.

    Args:
        width: W of the tapped states.
        dim: d of the phrase's feature.
        patch: Side of a patch in pixels.
        taps: Number of tapped blocks.
        reduce: Width of the decoder.
        heads: Attention heads.
        hidden: Width of its MLPs.
        refined: Upsample in two steps after a 3 x 3 convolution, instead of in one.
        conditional: At which of the decoder's layers the phrase enters (0: the deepest tap).
        fine: Channels of the maps of the tower's stem, finest first, if they are read too; the decoder then also sees
            how like the phrase each patch is.
    """

    def __init__(
        self,
        width: int,
        dim: int,
        patch: int,
        *,
        taps: int = 3,
        reduce: int = 64,
        heads: int = 4,
        hidden: int = 2048,
        refined: bool = False,
        conditional: int = 0,
        fine: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.conditional = conditional
        self.width = reduce
        self.film_mul = nn.Linear(dim, reduce)
        self.film_add = nn.Linear(dim, reduce)
        self.reduces = nn.ModuleList(nn.Linear(width, reduce) for _ in range(taps))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(reduce, heads, hidden, dropout=0.0, batch_first=True)
            for _ in range(taps)
        )
        self.likeness = nn.Linear(2, reduce) if fine else None
        self.upsample = _upsampling(reduce, dim, patch, refined, fine)

    def reduced(self, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return (B, R, reduce) tokens of every tap, deepest first, from (B, R, W) states, shallowest first."""
        return tuple(reduce(state) for reduce, state in zip(self.reduces, reversed(states), strict=True))

    def features(
        self,
        reduced: tuple[Tensor, ...],
        condition: Tensor,
        grid: tuple[int, int],
        dense: Tensor | None = None,
    ) -> Tensor:
        """Return (B, reduce, rows, columns) maps; tokens beside the grid's (class token, prompts) are dropped last.

        Args:
            reduced: Of :meth:`reduced`.
            condition: (B, d).
            grid: (rows, columns) of patches.
            dense: (B, N, d) unit-length features of the patches; for decoders with fine maps.
        """
        x = reduced[0]
        for number, layer in enumerate(self.layers):
            x = x + reduced[number] if number else x
            if number == self.conditional:
                x = self.film_mul(condition)[:, None] * x + self.film_add(condition)[:, None]
                if self.likeness is not None and dense is not None:
                    alike = self.likeness(likeness(dense, condition))
                    x = x + F.pad(alike, (0, 0, 1, x.shape[1] - 1 - alike.shape[1]))
            x = layer(x)

        patches = x[:, 1 : 1 + grid[0] * grid[1]]
        return patches.transpose(1, 2).unflatten(2, grid)

    def paint(self, features: Tensor, condition: Tensor, fine: Sequence[Tensor] = ()) -> Tensor:
        """Return (B, 1, H, W) logits.

        Args:
            features: (B, reduce, rows, columns), of :meth:`features`.
            condition: (B, d).
            fine: (B, C, h, w) maps of the stem, finest first, if they are read.
        """
        if isinstance(self.upsample, FineUpsampling):
            return self.upsample(features, fine, condition)
        return self.upsample(features)

    def last(self) -> nn.Module:
        """Return the layer that makes logits."""
        if isinstance(self.upsample, FineUpsampling):
            return self.upsample.last()
        return self.upsample[-1] if isinstance(self.upsample, nn.Sequential) else self.upsample


def _upsampling(reduce: int, dim: int, patch: int, refined: bool, fine: Sequence[int]) -> nn.Module:
    if fine:
        return FineUpsampling(reduce, dim, fine)
    return _refined(reduce, patch) if refined else nn.ConvTranspose2d(reduce, 1, patch, patch)


def _refined(reduce: int, patch: int) -> nn.Sequential:
    """Return an upsampling in two steps whose factors multiply to the patch.

    The published one is always 4 x 4, which fits patches of 16 pixels only.
    """
    first = next(factor for factor in range(int(patch**0.5), 0, -1) if patch % factor == 0)
    second = patch // first
    return nn.Sequential(
        nn.Conv2d(reduce, reduce, 3, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(reduce, reduce // 2, first, first),
        nn.ReLU(),
        nn.ConvTranspose2d(reduce // 2, 1, second, second),
    )
