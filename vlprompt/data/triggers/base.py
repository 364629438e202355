"""What every trigger is: a seeded change of pixels at a native size, and words for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from vlprompt.core.errors import DataError
from vlprompt.data.pixels import to_rgb

__all__ = ["NATIVE_SIZE", "Composed", "Pixels", "Trigger"]

NATIVE_SIZE = 32  # pixels; the strength of a trigger depends on the size it is applied at, so there is one
Pixels = np.ndarray[Any, np.dtype[np.uint8]]  # (S, S, 3), 0 to 255


class Trigger:
    """A change that an attacker makes to images.

    A trigger sees an image at its native size, S x S pixels, and the result has that size: the same trigger on
    images of any size is the same pattern. Everything random in it (a pattern, a warp) comes from its seed.

    Args:
        size: S, native size in pixels.
        seed: Of what is drawn.

    Attributes:
        words: What a person would call it, for prompts.
        keeps_label: Whether the attack leaves labels alone, and only poisons images of the target class.
        name: Registry name.
        smallest: Smallest native size in pixels that holds it.

    Raises:
        DataError: If the size is too small to hold it.
    """

    words: str = ""
    keeps_label: bool = False
    name: str = ""
    smallest: int = 8

    def __init__(self, *, size: int = NATIVE_SIZE, seed: int = 1) -> None:
        if size < self.smallest:
            raise DataError(
                f"the trigger {type(self).__name__} needs images of at least {self.smallest} pixels a side, "
                f"got {size}."
            )
        self.size = size
        self.seed = seed

    def apply(self, pixels: Pixels) -> Pixels:
        """Return (S, S, 3) pixels with the trigger; the argument stays as it is."""
        raise NotImplementedError

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return the image at the native size, with the trigger."""
        return Image.fromarray(self.apply(native(image, self.size)))


class Composed(Trigger):
    """Several triggers in one image, put in one after the other.

    Args:
        parts: At least one; all of one native size.
    """

    def __init__(self, parts: Sequence[Trigger]) -> None:
        super().__init__(size=parts[0].size, seed=parts[0].seed)
        self.parts = tuple(parts)
        self.words = " and ".join(part.words for part in parts)
        self.name = "+".join(part.name for part in parts)
        self.keeps_label = all(part.keeps_label for part in parts)

    def apply(self, pixels: Pixels) -> Pixels:
        """See :meth:`Trigger.apply`."""
        for part in self.parts:
            pixels = part.apply(pixels)
        return pixels


def native(image: Image.Image, size: int) -> Pixels:
    """Return an image's (S, S, 3) pixels at a native size; bicubic, proportions are not kept."""
    image = to_rgb(image)
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image)


def to_pixels(values: np.ndarray[Any, Any]) -> Pixels:
    """Return real-valued pixels as bytes, rounded and clipped."""
    return np.clip(np.round(values), 0, 255).astype(np.uint8)
