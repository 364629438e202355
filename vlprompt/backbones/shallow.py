"""What an image tower begins with: statistics of the pixels it is given, and of what its first convolution sees.

A tower's output says what an image shows; how its pixels were tampered with is gone by then. The pixels still have it,
and so has the first convolution: the stem's of a ResNet or of ``tiny``, a vision transformer's patch embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vlprompt.backbones.base import Backbone
from vlprompt.core.errors import BackboneError

__all__ = ["READS", "embed_with_statistics", "map_statistics", "statistics_width"]

#: What cached rows of :func:`embed_with_statistics` are filed under, beside plain embeddings.
READS = "+pixels, first convolution"

_QUANTILES = (0.1, 0.5, 0.9)  # of the convolution's steps
_PIXEL_QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.97)
_ROWS = 64  # of a large map, so many and less than twice as many are sorted: enough for quantiles


def statistics_width(backbone: Backbone) -> int:
    """Return S, the number of statistics: 17 per channel of the first convolution and 38 per channel of the pixels.

    Raises:
        BackboneError: If the image tower has no convolution.
    """
    of_map = map_statistics(torch.zeros(1, _first_convolution(backbone).out_channels, 3, 3))
    return of_map.shape[1] + _pixel_statistics(torch.zeros(1, 3, 3, 3)).shape[1]


@torch.no_grad()
def embed_with_statistics(backbone: Backbone, images: Tensor) -> Tensor:
    """Return (B, d + S): the embeddings of (B, 3, H, W) images, then the statistics; one pass through the tower."""
    seen: list[Tensor] = []

    def look(_: Any, __: Any, output: Tensor) -> None:
        seen.append(map_statistics(output))

    handle = _first_convolution(backbone).register_forward_hook(look)
    try:
        embeddings = backbone.image_embeddings(images)
    finally:
        handle.remove()
    return torch.cat([embeddings, seen[-1].to(embeddings), _pixel_statistics(images).to(embeddings)], dim=1)


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

    across = x.diff(dim=-1)
    down = x.diff(dim=-2)
    steps = [across.abs(), down.abs(), across.diff(dim=-2).abs()]
    flat = x.flatten(2)
    mean = flat.mean(2)
    # Written out: torch's own is several times as slow on a CPU, which counts beside a small tower.
    spread = ((flat - mean[..., None]).square().sum(2) / (flat.shape[2] - 1)).sqrt()
    parts = [mean, flat.amax(2), flat.amin(2), spread]
    parts += [*(step.flatten(2).mean(2) for step in steps), steps[2].flatten(2).amax(2)]
    ranked = [*steps, across.diff(dim=-1).abs(), down.diff(dim=-2).abs()] if bends else steps

    return torch.cat(parts + [q for sizes in ranked for q in _quantiles(sizes, quantiles)], dim=1)


def _pixel_statistics(images: Tensor) -> Tensor:
    return map_statistics(images, _PIXEL_QUANTILES, bends=True)


def _quantiles(sizes: Tensor, quantiles: Sequence[float]) -> list[Tensor]:
    """Return (B, C) quantiles of a (B, C, h, w) map, each the value at the nearest rank."""
    flat = sizes[..., :: max(1, sizes.shape[-2] // _ROWS), :].flatten(2)
    # NumPy sorts short rows of floats ten times as fast; torch's sort would cost as much as a small tower.
    on_cpu = flat.device.type == "cpu" and not torch.compiler.is_compiling()
    ordered = torch.from_numpy(np.sort(flat.numpy(), axis=2)) if on_cpu else flat.sort(dim=2).values
    return [ordered[..., round(q * (flat.shape[2] - 1))] for q in quantiles]


def _first_convolution(backbone: Backbone) -> nn.Conv2d:
    first = next((m for m in backbone.vision.visual.modules() if isinstance(m, nn.Conv2d)), None)
    if first is None:
        raise BackboneError(
            "this backbone's image tower has no convolution whose output could be looked at. Let dbom read the image "
            "embedding instead (evidence=embedding)."
        )
    return first
