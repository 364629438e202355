"""Upsampling that reads the maps of a stem on its way to the pixels; the phrase modulates each of them.

Patches of 32 pixels say what is where, the stem's maps where it ends. The way is a U-Net's (Ronneberger et al., MICCAI
2015, arXiv 1505.04597), the modulation CLIPSeg's own (FiLM, Perez et al., AAAI 2018, arXiv 1709.07871).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["FineMaps", "FineUpsampling", "likeness"]

_CHANNELS = (16, 24, 32, 48)  # of a level, finest first; coarser ones have the last
_GROUPS = 8  # channels that are normalised together


def likeness(dense: Tensor, condition: Tensor) -> Tensor:
    """Return how like a phrase each patch is, twice.

    Args:
        dense: (B, N, d) unit-length features of the patches.
        condition: (B, d) features of the phrases, of any length.

    Returns:
        (B, N, 2): ten times the cosine, and the cosine's distance from its mean in units of its deviation.
    """
    cosine = torch.einsum("bnd,bd->bn", dense, F.normalize(condition, dim=-1))
    centred = cosine - cosine.mean(1, keepdim=True)
    spread = centred.square().mean(1, keepdim=True).sqrt()
    return torch.stack([10 * cosine, centred / (spread + 1e-3)], dim=-1)


class FineMaps(nn.Module):
    """Coarse features and finer maps of a stem to features as fine as the finest map.

    Attributes:
        width: Channels of what comes out.

    Args:
        features: Channels of the coarse features.
        dim: d of the phrase's feature.
        widths: Channels of the maps, finest first; each is half as large as the one before.
    """

    def __init__(self, features: int, dim: int, widths: Sequence[int]) -> None:
        super().__init__()
        channels = [_CHANNELS[min(level, len(_CHANNELS) - 1)] for level in range(len(widths))]
        coarser = [*channels[1:], features]
        levels = list(zip(widths, channels, coarser, strict=True))
        self.lateral = nn.ModuleList(nn.Conv2d(width, own, 1) for width, own, _ in levels)
        self.lateral_norm = nn.ModuleList(nn.GroupNorm(1, own) for own in channels)
        self.film = nn.ModuleList(nn.Linear(dim, 2 * own) for own in channels)
        self.merge = nn.ModuleList(nn.Conv2d(own + above, own, 3, padding=1) for _, own, above in levels)
        self.merge_norm = nn.ModuleList(nn.GroupNorm(own // _GROUPS, own) for own in channels)
        self.width = channels[0]

    def forward(self, x: Tensor, maps: Sequence[Tensor], condition: Tensor) -> Tensor:
        """Return (B, width, h', w') of the finest map's size.

        Args:
            x: (B, features, h, w).
            maps: (B, C, h', w') each, finest first.
            condition: (B, d).
        """
        for level in reversed(range(len(maps))):
            gain, shift = self.film[level](condition)[:, :, None, None].chunk(2, dim=1)
            skip = (1 + gain) * self.lateral_norm[level](self.lateral[level](maps[level])) + shift
            x = F.interpolate(x, size=skip.shape[-2:], mode="bilinear", align_corners=False)
            x = F.gelu(self.merge_norm[level](self.merge[level](torch.cat([x, skip], dim=1))))
        return x

    def last(self) -> nn.Module:
        """Return the last convolution."""
        return self.merge[0]


class FineUpsampling(FineMaps):
    """Features of patches and maps of a stem to logits; arguments as of :class:`FineMaps`.

    The finest map is half as large as the image.
    """

    def __init__(self, features: int, dim: int, widths: Sequence[int]) -> None:
        super().__init__(features, dim, widths)
        self.head = nn.Conv2d(self.width, 1, 3, padding=1)

    def forward(self, x: Tensor, maps: Sequence[Tensor], condition: Tensor) -> Tensor:
        """Return (B, 1, H, W) logits; arguments as of :meth:`FineMaps.forward`."""
        x = self.head(super().forward(x, maps, condition))
        return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)

    def last(self) -> nn.Module:
        """Return the layer that makes logits."""
        return self.head
