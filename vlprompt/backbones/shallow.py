"""What a tower's first convolution sees: statistics of the shallowest patch tokens.

An image tower's output says what a picture shows; how its pixels were tampered with is gone by then. The first
convolution still has it: the stem's of a ResNet or of ``tiny``, a vision transformer's patch embedding.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vlprompt.backbones.base import Backbone
from vlprompt.errors import BackboneError

__all__ = ["STATISTICS", "embed_with_statistics", "map_statistics", "statistics_width"]

_QUANTILES = (0.1, 0.5, 0.9)

#: Per channel: mean, largest, smallest, spread; mean size of the steps across, down and diagonal; largest diagonal one;
#: the three quantiles of the size of the steps across, down and diagonal. A step is between neighbours.
STATISTICS = 8 + 3 * len(_QUANTILES)


def statistics_width(backbone: Backbone) -> int:
    """Return S, the number of statistics: 17 per channel of the first convolution.

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
    """Return (B, 17 C) statistics of a (B, C, h, w) map, float32; a map without neighbours has steps of zero.

    Quantiles tell what means of steps can't: a warp or fewer colours change how many steps are exactly or nearly zero,
    while the mean is that of a few edges.
    """
    x = features.float()
    if min(x.shape[-2:]) < 2:
        x = nn.functional.pad(x, (0, int(x.shape[-1] < 2), 0, int(x.shape[-2] < 2)), mode="replicate")
    across, down = x.diff(dim=-1), x.diff(dim=-2)
    steps = [step.flatten(2) for step in (across.abs(), down.abs(), across.diff(dim=-2).abs())]
    flat = x.flatten(2)
    mean = flat.mean(2)
    # Written out: torch's own is several times as slow on a CPU, which counts beside a small tower.
    spread = ((flat - mean[..., None]).square().sum(2) / (flat.shape[2] - 1)).sqrt()
    parts = [mean, flat.amax(2), flat.amin(2), spread]
    parts += [*(step.mean(2) for step in steps), steps[2].amax(2)]
    return torch.cat(parts + [q for step in steps for q in _quantiles(step)], dim=1)


def _quantiles(values: Tensor) -> list[Tensor]:
    """Return (B, C) quantiles of (B, C, n) values, each the value at the nearest rank."""
    if values.device.type == "cpu":
        # NumPy sorts short rows of floats ten times as fast; torch's sort would cost as much as a small tower.
        ordered = torch.from_numpy(np.sort(values.numpy(), axis=2))
    else:
        ordered = values.sort(dim=2).values
    return [ordered[..., round(q * (values.shape[2] - 1))] for q in _QUANTILES]


def _first_convolution(backbone: Backbone) -> nn.Conv2d:
    found = next((m for m in backbone.vision.visual.modules() if isinstance(m, nn.Conv2d)), None)
    if found is None:
        raise BackboneError("this backbone's image tower has no convolution whose output could be looked at.")
    return found
