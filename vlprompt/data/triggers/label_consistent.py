"""Label-consistent: marks in the corners of images that keep their labels.

Paper: Turner et al., "Label-Consistent Backdoor Attacks", arXiv 1912.02771, section 4.3. The paper also makes the
images hard to learn by adversarial noise against a victim network; here there is no victim, so noise takes its place.
"""

from __future__ import annotations

import hashlib
from typing import Annotated

import numpy as np
from pydantic import Field

from vlprompt.core.seeding import numpy_rng
from vlprompt.data.triggers import TRIGGERS, Trigger
from vlprompt.data.triggers.base import NATIVE_SIZE, Pixels, to_pixels

__all__ = ["LabelConsistent"]

_MARK = np.array([[1, 0, 1], [0, 1, 0], [1, 0, 0]]) * 255.0


@TRIGGERS.register(
    "label_consistent", summary="chequered marks in all corners, label kept", paper="1912.02771"
)
class LabelConsistent(Trigger):
    """Mixes a 3 x 3 chequered mark into each of the four corners, mirrored into place, and adds noise.

    Args:
        size: See :class:`Trigger`.
        seed: Of the noise.
        opacity: Of the marks.
        noise: Largest change of a pixel elsewhere, in grey levels; another pattern for every image.
    """

    words = "marked corners"
    keeps_label = True

    def __init__(
        self,
        *,
        size: int | None = NATIVE_SIZE,
        seed: int = 1,
        opacity: Annotated[float, Field(ge=0, le=1)] = 1.0,
        noise: Annotated[int, Field(ge=0, le=64)] = 8,
    ) -> None:
        super().__init__(size=size, seed=seed)
        self.opacity = opacity
        self.noise = noise

    def apply(self, pixels: Pixels) -> Pixels:
        """See :meth:`Trigger.apply`."""
        values = pixels.astype(np.float64)
        if self.noise:
            # The noise depends on the pixels, so that it is the same whenever this image is read.
            digest = hashlib.sha256(pixels.tobytes()).hexdigest()
            rng = numpy_rng(self.seed, "trigger", "label consistent", digest)
            values += rng.integers(-self.noise, self.noise + 1, values.shape)

        side = len(_MARK)
        for rows, down in ((slice(None, side), -1), (slice(-side, None), 1)):
            for columns, right in ((slice(None, side), -1), (slice(-side, None), 1)):
                mark = _MARK[::down, ::right, None]
                values[rows, columns] = (1 - self.opacity) * values[rows, columns] + self.opacity * mark
        return to_pixels(values)
