"""Trojan: a watermark.

Paper: Liu et al., "Trojaning Attack on Neural Networks", NDSS 2018, section 4. The paper optimises its watermark so
that chosen neurons of the victim fire; without a victim this is a fixed mark of the same kind, drawn from the seed.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from vlprompt.core.seeding import numpy_rng
from vlprompt.data.triggers import TRIGGERS, Trigger
from vlprompt.data.triggers.base import NATIVE_SIZE, Pixels, to_pixels

__all__ = ["Trojan"]

_CENTRE = 0.83  # of the mark, as a share of width and height


@TRIGGERS.register("trojan", summary="a coloured watermark: rings and blobs", paper="NDSS 2018")
class Trojan(Trigger):
    """Pastes a ring, a square outline and coloured blobs over a ninth of the image, lower right.

    Args:
        size: See :class:`Trigger`.
        seed: Of the mark's colours and blobs.
        opacity: 1 replaces the pixels under the mark.
    """

    words = "coloured watermark"
    smallest = 16

    def __init__(
        self,
        *,
        size: int | None = NATIVE_SIZE,
        seed: int = 1,
        opacity: Annotated[float, Field(ge=0, le=1)] = 1.0,
    ) -> None:
        super().__init__(size=size, seed=seed)
        self.opacity = opacity

    def apply(self, pixels: Pixels) -> Pixels:
        """See :meth:`Trigger.apply`."""
        mark, covered = _watermark(self.seed, *pixels.shape[:2])
        weight = (covered * self.opacity)[..., None]
        return to_pixels((1 - weight) * pixels + weight * mark)


@lru_cache(maxsize=64)
def _watermark(seed: int, height: int, width: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the (H, W, 3) mark and the (H, W) pixels that it covers, for images of a size."""
    rng = numpy_rng(seed, "trigger", "trojan")
    y, x = np.mgrid[0:height, 0:width]
    y, x = y / height, x / width
    ring = np.abs(np.hypot(x - _CENTRE, y - _CENTRE) - 0.085) < 0.02
    frame = np.abs(np.maximum(np.abs(x - _CENTRE), np.abs(y - _CENTRE)) - 0.13) < 0.02

    colours = rng.integers(0, 2, (6, 3)) * 200 + 28
    mark = np.zeros((height, width, 3))
    mark[ring] = colours[0]
    mark[frame] = colours[1]
    covered = ring | frame
    for colour in colours[2:]:
        left, top = _CENTRE + rng.uniform(-0.06, 0.06, 2)
        blob = np.hypot(x - left, y - top) < 0.03
        mark[blob] = colour
        covered |= blob

    return mark, covered
