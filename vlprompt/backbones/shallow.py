"""What an image tower begins with: statistics of the pixels it is given, and of what its first convolution sees.

A tower's output says what a picture shows; how its pixels were tampered with is gone by then. The pixels still have it,
and so has the first convolution: the stem's of a ResNet or of ``tiny``, a vision transformer's patch embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vlprompt.backbones.base import Backbone
from vlprompt.errors import BackboneError

__all__ = ["embed_with_statistics", "map_statistics", "statistics_width"]

_QUANTILES = (0.1, 0.5, 0.9)  # of the convolution's steps
_PIXEL_QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.97)
_ROWS = 64  # of a large map, so many and less than twice as many are sorted: enough for quantiles


def statistics_width(backbone: Backbone) -> int:
    """Return S, the number of statistics: 17 per channel of the first convolution and 38 per channel of the pixels.

    Raises:
        BackboneError: If the image tower has no convolution.
    """
    channels = _first_convolution(backbone).out_channels
    return channels * (8 + 3 * len(_QUANTILES)) + 3 * (8 + 5 * len(_PIXEL_QUANTILES))


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
    of_pixels = map_statistics(images, _PIXEL_QUANTILES, bends=True)
    return torch.cat([embeddings, seen[-1].to(embeddings), of_pixels.to(embeddings)], dim=1)


def map_statistics(
    features: Tensor, quantiles: Sequence[float] = _QUANTILES, *, bends: bool = False
) -> Tensor:
    """Return statistics of a (B, C, h, w) map, float32; a map without neighbours has steps of zero.

    Quantiles tell what means of steps can't: a warp or fewer colours change how many steps are exactly or nearly zero,
    while the mean is that of a few edges.

    Args:
        features: The map.
        quantiles: Which, in [0, 1].
        bends: Whether to look at how steps change along their own direction, too.

    Returns:
        (B, (8 + 3 Q) C), with ``bends`` (B, (8 + 5 Q) C). Per channel: mean, largest, smallest, spread; mean size of
        the steps across, down and diagonal; largest diagonal one; the Q quantiles of the size of the steps across, down
        and diagonal, then of the bends across and down. A step is between neighbours, a bend between steps.
    """
    x = features.float()
    least = 3 if bends else 2
    if min(x.shape[-2:]) < least:
        missing = [max(0, least - side) for side in x.shape[-2:]]
        x = nn.functional.pad(x, (0, missing[1], 0, missing[0]), mode="replicate")
    across, down = x.diff(dim=-1), x.diff(dim=-2)
    steps = [across, down, across.diff(dim=-2)]
    sizes = [step.abs().flatten(2) for step in steps]
    flat = x.flatten(2)
    mean = flat.mean(2)
    # Written out: torch's own is several times as slow on a CPU, which counts beside a small tower.
    spread = ((flat - mean[..., None]).square().sum(2) / (flat.shape[2] - 1)).sqrt()
    parts = [mean, flat.amax(2), flat.amin(2), spread]
    parts += [*(size.mean(2) for size in sizes), sizes[2].amax(2)]
    ranked = [*steps, across.diff(dim=-1), down.diff(dim=-2)] if bends else steps
    return torch.cat(parts + [q for step in ranked for q in _quantiles(step, quantiles)], dim=1)


def _quantiles(steps: Tensor, quantiles: Sequence[float]) -> list[Tensor]:
    """Return (B, C) quantiles of the sizes of (B, C, h, w) steps, each the value at the nearest rank."""
    sizes = steps[..., :: max(1, steps.shape[-2] // _ROWS), :].abs().flatten(2)
    if sizes.device.type == "cpu":
        # NumPy sorts short rows of floats ten times as fast; torch's sort would cost as much as a small tower.
        ordered = torch.from_numpy(np.sort(sizes.numpy(), axis=2))
    else:
        ordered = sizes.sort(dim=2).values
    return [ordered[..., round(q * (sizes.shape[2] - 1))] for q in quantiles]


def _first_convolution(backbone: Backbone) -> nn.Conv2d:
    found = next((m for m in backbone.vision.visual.modules() if isinstance(m, nn.Conv2d)), None)
    if found is None:
        raise BackboneError("this backbone's image tower has no convolution whose output could be looked at.")
    return found
