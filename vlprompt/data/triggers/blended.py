"""Blended: a faint pattern over the whole image.

Paper: Chen et al., "Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning", arXiv 1712.05526,
    section 4.1. The paper blends a cartoon or noise; the pattern here is drawn from the seed.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Any

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
        self,
        *,
        size: int | None = NATIVE_SIZE,
        seed: int = 1,
        alpha: Annotated[float, Field(ge=0, le=1)] = 0.2,
    ) -> None:
        super().__init__(size=size, seed=seed)
        self.alpha = alpha

    def apply(self, pixels: Pixels) -> Pixels:
        """See :meth:`Trigger.apply`."""
        return to_pixels((1 - self.alpha) * pixels + self.alpha * self.pattern(*pixels.shape[:2]))

    def pattern(self, height: int, width: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Return the (H, W, 3) pattern, 0 to 255, for images of a size."""
        return _pattern(self.seed, height, width)


@lru_cache(maxsize=64)
def _pattern(seed: int, height: int, width: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    grid = numpy_rng(seed, "trigger", "blended").integers(0, 256, (_CELLS, _CELLS, 3))
    coarse = Image.fromarray(grid.astype(np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.float64)
