"""BPP: fewer levels per colour.

Paper: Wang et al., "BppAttack: Stealthy and Efficient Trojan Attacks against Deep Neural Networks via Image
    Quantization and Contrastive Adversarial Learning", CVPR 2022, arXiv 2205.13383, section 3; without its dithering
    unless asked for.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from vlprompt.data.triggers import TRIGGERS, Trigger
from vlprompt.data.triggers.base import NATIVE_SIZE, Pixels, to_pixels

__all__ = ["BPP"]


@TRIGGERS.register("bpp", summary="colours rounded to few levels", paper="2205.13383")
class BPP(Trigger):
    """Rounds every channel to ``levels`` evenly spaced values from 0 to 255.

    Args:
        size: See :class:`Trigger`.
        seed: See :class:`Trigger`; nothing is drawn.
        levels: Values per channel.
        dither: Hand each pixel's rounding error on to its neighbours (Floyd and Steinberg).
    """

    words = "posterised colours"

    def __init__(
        self,
        *,
        size: int | None = NATIVE_SIZE,
        seed: int = 1,
        levels: Annotated[int, Field(ge=2, le=256)] = 8,
        dither: bool = False,
    ) -> None:
        super().__init__(size=size, seed=seed)
        self.step = 255 / (levels - 1)
        self.dither = dither

    def apply(self, pixels: Pixels) -> Pixels:
        """See :meth:`Trigger.apply`."""
        if not self.dither:
            return to_pixels(np.round(pixels / self.step) * self.step)

        # A border of one pixel takes the errors that leave the image.
        values = np.pad(pixels.astype(np.float64), ((0, 1), (1, 1), (0, 0)))
        height, width = pixels.shape[:2]
        for i in range(height):
            for j in range(1, width + 1):
                old = values[i, j].copy()
                values[i, j] = np.clip(np.round(old / self.step), 0, round(255 / self.step)) * self.step

                error = old - values[i, j]
                values[i, j + 1] += error * 7 / 16
                values[i + 1, j - 1 : j + 2] += error * np.array([3, 5, 1])[:, None] / 16
        return to_pixels(values[:-1, 1:-1])
