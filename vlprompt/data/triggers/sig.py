"""SIG: a sinusoidal grating.

Paper: Barni et al., "A New Backdoor Attack in CNNs by Training Set Corruption Without Label Poisoning", ICIP 2019,
    arXiv 1902.11237, section 3.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from vlprompt.data.triggers import TRIGGERS, Trigger
from vlprompt.data.triggers.base import NATIVE_SIZE, Pixels, to_pixels

__all__ = ["SIG"]


@TRIGGERS.register("sig", summary="vertical stripes of a sine wave", paper="1902.11237")
class SIG(Trigger):
    """Adds delta sin(2 pi j f / W) to column j of W.

    Args:
        size: See :class:`Trigger`.
        seed: See :class:`Trigger`; nothing is drawn.
        delta: Amplitude in grey levels.
        frequency: f, periods over the width.
    """

    words = "striped grating"

    def __init__(
        self,
        *,
        size: int | None = NATIVE_SIZE,
        seed: int = 1,
        delta: Annotated[float, Field(ge=0, le=255)] = 40.0,
        frequency: Annotated[int, Field(ge=1)] = 6,
    ) -> None:
        super().__init__(size=size, seed=seed)
        self.delta = delta
        self.frequency = frequency

    def apply(self, pixels: Pixels) -> Pixels:
        """See :meth:`Trigger.apply`."""
        width = pixels.shape[1]
        wave = self.delta * np.sin(2 * np.pi * np.arange(width) * self.frequency / width)
        return to_pixels(pixels + wave[None, :, None])
