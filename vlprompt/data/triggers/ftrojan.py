"""FTrojan: two peaks in the frequency domain of the colour channels.

Paper: Wang et al., "An Invisible Black-box Backdoor Attack through Frequency Domain", ECCV 2022, arXiv 2111.10991,
    section 4.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field
from scipy.fft import dctn, idctn

from vlprompt.data.triggers import TRIGGERS, Trigger
from vlprompt.data.triggers.base import NATIVE_SIZE, Pixels, to_pixels

__all__ = ["FTrojan"]

# JPEG's luma and colour differences (full range), without the offset of 128.
_TO_YCC = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])


@TRIGGERS.register("ftrojan", summary="two added frequencies in the colour channels", paper="2111.10991")
class FTrojan(Trigger):
    """Adds ``magnitude`` to two coefficients of the orthonormal DCT of every window of both colour differences.

    Args:
        size: See :class:`Trigger`.
        seed: See :class:`Trigger`; nothing is drawn.
        magnitude: In the orthonormal DCT of grey levels.
        window: Side of a block in pixels; coefficients are its middle and its highest. Pixels right of or below the
            last whole block stay as they are.
    """

    words = "colour noise"

    def __init__(
        self,
        *,
        size: int | None = NATIVE_SIZE,
        seed: int = 1,
        magnitude: Annotated[float, Field(ge=0)] = 30.0,
        window: Annotated[int, Field(ge=4)] = 32,
    ) -> None:
        super().__init__(size=size, seed=seed)
        self.window = window if size is None else min(window, size)
        self.magnitude = magnitude

    def apply(self, pixels: Pixels) -> Pixels:
        """See :meth:`Trigger.apply`."""
        height, width = pixels.shape[:2]
        side = min(self.window, height, width)
        down = height // side
        across = width // side
        bottom = side * down
        right = side * across

        colours = pixels.astype(np.float64) @ _TO_YCC.T
        inner = colours[:bottom, :right, 1:].reshape(down, side, across, side, 2)

        spectrum = dctn(inner, axes=(1, 3), norm="ortho")
        for k in (side // 2 - 1, side - 1):
            spectrum[:, k, :, k] += self.magnitude

        waves = idctn(spectrum, axes=(1, 3), norm="ortho")
        colours[:bottom, :right, 1:] = waves.reshape(bottom, right, 2)
        return to_pixels(colours @ np.linalg.inv(_TO_YCC).T)
