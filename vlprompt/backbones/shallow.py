"""What a tower's first convolution sees: statistics of the shallowest patch tokens.

An image tower's output says what a picture shows; how its pixels were tampered with is gone by then. The first
convolution still has it: the stem's of a ResNet or of ``tiny``, a vision transformer's patch embedding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlprompt.backbones.base import Backbone
from vlprompt.errors import BackboneError

__all__ = ["STATISTICS", "embed_with_statistics", "map_statistics", "statistics_width"]

#: Per channel: mean, largest, smallest, spread; mean size of the steps across, down and diagonal; largest diagonal one.
STATISTICS = 8


def statistics_width(backbone: Backbone) -> int:
    """Return S, the number of statistics: eight per channel of the first convolution.

    Raises:
        BackboneError: If the image tower has no convolution.
    """
    return STATISTICS * _first_convolution(backbone).out_channels


@torch.no_grad()
def embed_with_statistics(backbone: Backbone, images: Tensor) -> Tensor:
    """Return (B, d + S): the embeddings of (B, 3, H, W) pictures, then the statistics; one pass through the tower."""
    seen: list[Tensor] = []

    def look(_: Any, __: Any, output: Tensor) -> None:
        seen.append(map_statistics(output))

    handle = _first_convolution(backbone).register_forward_hook(look)
    try:
        embeddings = backbone.image_embeddings(images)
    finally:
        handle.remove()
    return torch.cat([embeddings, seen[-1].to(embeddings)], dim=1)


def map_statistics(features: Tensor) -> Tensor:
    """Return (B, 8 C) statistics of a (B, C, h, w) map, float32; a map without neighbours has steps of zero."""
    x = features.float()
    if min(x.shape[-2:]) < 2:
        x = nn.functional.pad(x, (0, int(x.shape[-1] < 2), 0, int(x.shape[-2] < 2)), mode="replicate")
    across, down = x.diff(dim=-1), x.diff(dim=-2)
    diagonal = across.diff(dim=-2).abs().flatten(2)
    flat = x.flatten(2)
    parts = [
        flat.mean(2),
        flat.amax(2),
        flat.amin(2),
        flat.std(2),
        across.abs().flatten(2).mean(2),
        down.abs().flatten(2).mean(2),
        diagonal.mean(2),
        diagonal.amax(2),
    ]
    return torch.cat(parts, dim=1)


def _first_convolution(backbone: Backbone) -> nn.Conv2d:
    found = next((m for m in backbone.vision.visual.modules() if isinstance(m, nn.Conv2d)), None)
    if found is None:
        raise BackboneError("this backbone's image tower has no convolution whose output could be looked at.")
    return found
