"""Upsampling that reads the maps of a stem on its way to the pixels; the phrase modulates each of them.

Patches of 32 pixels say what is where, the stem's maps where it ends. The way is a U-Net's (Ronneberger et al., MICCAI
2015, arXiv 1505.04597), the modulation CLIPSeg's own (FiLM, Perez et al., AAAI 2018, arXiv 1709.07871).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["FineUpsampling"]

_CHANNELS = (16, 24, 32, 48)  # of a level, finest first; coarser ones have the last
_GROUPS = 8  # channels that are normalised together


class FineUpsampling(nn.Module):
    """Features of patches and maps of a stem to logits.

    Args:
        features: Channels of the patches' features.
        dim: d of the phrase's feature.
        widths: Channels of the maps, finest first; each is half as large as the one before, the first half the image.
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
        self.head = nn.Conv2d(channels[0], 1, 3, padding=1)

    def forward(self, x: Tensor, maps: Sequence[Tensor], condition: Tensor) -> Tensor:
        """Return (B, 1, H, W) logits.

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

        return F.interpolate(self.head(x), scale_factor=2.0, mode="bilinear", align_corners=False)
