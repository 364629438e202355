"""Blended: a faint pattern over the whole image.

Paper: Chen et al., "Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning", arXiv 1712.05526,
    section 4.1. The paper blends a cartoon or noise; the pattern here is drawn from the seed.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from PIL import Image
from pydantic import Field

from vlprompt.core.seeding import numpy_rng
from vlprompt.data.triggers import TRIGGERS, Trigger
from vlprompt.data.triggers.base import NATIVE_SIZE, Pixels, to_pixels

__all__ = ["Blended"]

_CELLS = 8  # the pattern's coarse grid of colours


@TRIGGERS.register("blended", summary="a faint seeded pattern over the whole image", paper="1712.05526")
class Blended(Trigger):
    """Mixes (1 - alpha) image + alpha pattern; the pattern is a smoothed grid of random colours.

    Args:
        size: See :class:`Trigger`.
        seed: Of the pattern.
        alpha: Share of the pattern.
    """

    words = "faint overlay"

    def __init__(
        self, *, size: int = NATIVE_SIZE, seed: int = 1, alpha: Annotated[float, Field(ge=0, le=1)] = 0.2
    ) -> None:
        super().__init__(size=size, seed=seed)
        self.alpha = alpha
        grid = numpy_rng(seed, "trigger", "blended").integers(0, 256, (_CELLS, _CELLS, 3))
        coarse = Image.fromarray(grid.astype(np.uint8))
        self.pattern = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)).astype(np.float64)

    def apply(self, pixels: Pixels) -> Pixels:
        """See :meth:`Trigger.apply`."""
        return to_pixels((1 - self.alpha) * pixels + self.alpha * self.pattern)
