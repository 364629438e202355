"""WaNet: a slight elastic warp.

Paper: Nguyen and Tran, "WaNet - Imperceptible Warping-based Backdoor Attack", ICLR 2021, arXiv 2102.10369, section 3.
Differs from the published code: bytes are warped, not normalised tensors, and the noise of ``jitter`` is uniform and
said to be.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from vlprompt.core.seeding import torch_rng
from vlprompt.data.triggers import TRIGGERS, Trigger
from vlprompt.data.triggers.base import NATIVE_SIZE, Pixels, to_pixels

__all__ = ["WaNet"]


@TRIGGERS.register("wanet", summary="a slight elastic warp, one fixed field", paper="2102.10369")
class WaNet(Trigger):
    """Moves every pixel by a smooth field that the seed fixes.

    Args:
        size: See :class:`Trigger`.
        seed: Of the field.
        grid: k, side of the coarse grid whose random offsets are smoothed to the whole image.
        strength: s, mean offset in pixels along each axis (before smoothing).
        jitter: Adds to every pixel's position a further uniform offset of at most this many pixels, drawn for each
            image: the paper's noise mode, whose images keep their labels.
    """

    words = "elastic warp"

    def __init__(
        self,
        *,
        size: int | None = NATIVE_SIZE,
        seed: int = 1,
        grid: Annotated[int, Field(ge=2)] = 4,
        strength: Annotated[float, Field(ge=0)] = 0.5,
        jitter: Annotated[float, Field(ge=0)] = 0.0,
    ) -> None:
        super().__init__(size=size, seed=seed)
        self.grid = grid
        self.strength = strength
        self.jitter = jitter
        self.keeps_label = jitter > 0

    def apply(self, pixels: Pixels) -> Pixels:
        """See :meth:`Trigger.apply`."""
        height, width = pixels.shape[:2]
        positions = _positions(self.seed, self.grid, self.strength, height, width)
        if self.jitter:
            # The offsets depend on the pixels, so that they are the same whenever this image is read.
            digest = hashlib.sha256(pixels.tobytes()).hexdigest()
            generator = torch_rng(self.seed, "trigger", "wanet jitter", digest)
            offsets = torch.rand(positions.shape, generator=generator) * 2 - 1
            positions = (positions + self.jitter * offsets / torch.tensor([width, height])).clamp(-1, 1)

        image = torch.tensor(pixels).permute(2, 0, 1)[None].float()
        warped = F.grid_sample(
            image, positions[None], mode="bilinear", padding_mode="border", align_corners=True
        )
        return to_pixels(warped[0].permute(1, 2, 0).numpy())


@lru_cache(maxsize=64)
def _positions(seed: int, grid: int, strength: float, height: int, width: int) -> Tensor:
    """Return (H, W, 2) positions from -1 to 1, x then y, from where pixels of an image of a size come."""
    noise = torch.rand(1, 2, grid, grid, generator=torch_rng(seed, "trigger", "wanet")) * 2 - 1
    noise = noise / noise.abs().mean()
    field = F.interpolate(noise, (height, width), mode="bicubic", align_corners=True)[0].permute(1, 2, 0)

    y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    identity = torch.stack([x, y], dim=-1)
    # A position of -1 to 1 spans W - 1 pixels between the centres of the outermost ones; the paper divides by the size.
    return (identity + strength * field / torch.tensor([width, height])).clamp(-1, 1)
