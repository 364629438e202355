"""A new last layer beside the pretrained one, in all models alike: logits = (1 - r) * old + r * new, r learned.

TuneVLSeg, ACCV 2024, arXiv 2410.05239; its code leaves the layer out of two strategies and adds it
unblended in a third.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["NewLastLayer"]


class NewLastLayer(nn.Module):
    """Upsampled features through one 5 x 5 convolution.

    Args:
        channels: Of the features.
        reduce: First to so many channels by a 1 x 1 convolution without bias; None: not at all.
        ratio: Where r starts.
    """

    def __init__(self, channels: int, reduce: int | None = None, ratio: float = 0.5) -> None:
        super().__init__()
        self.reduce = None if reduce is None else nn.Conv2d(channels, reduce, 1, bias=False)
        width = reduce or channels
        self.paint = nn.Conv2d(width, 1, 5, padding="same", padding_mode="replicate")
        self.ratio = nn.Parameter(torch.tensor(ratio))

    def forward(self, features: Tensor, logits: Tensor) -> Tensor:
        """Blend (B, 1, H, W) logits with those of (B, channels, h, w) features."""
        x = features if self.reduce is None else self.reduce(features)
        x = F.interpolate(x, size=logits.shape[-2:], mode="bilinear", align_corners=False)
        return torch.lerp(logits, self.paint(x), self.ratio)
