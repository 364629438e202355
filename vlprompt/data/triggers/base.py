"""What every trigger is: a seeded change of pixels at a native size, and words for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from PIL import Image
from pydantic import Field

from vlprompt.core.errors import DataError
from vlprompt.core.pixels import to_rgb

__all__ = [
    "NATIVE_SIZE",
    "OWN_SIZE",
    "Composed",
    "NativeSize",
    "Pixels",
    "Trigger",
    "native",
    "size_label",
    "size_of",
]

NATIVE_SIZE = 32  # pixels; the strength of a trigger depends on the size it is applied at, so there is one
OWN_SIZE = "own"
"""How configurations and manifests say that images keep the size they come with."""

Pixels = np.ndarray[Any, np.dtype[np.uint8]]  # (H, W, 3), 0 to 255


class Trigger:
    """A change that an attacker makes to images.

    With a native size S a trigger sees every image at S x S pixels, and the result has that size: the same trigger on
    images of any size is the same pattern. Without one it sees an image at the size it comes with, H x W pixels, and
    the pattern is drawn for that size; what is counted in pixels (a patch, a warp, a window) stays that many pixels.
    Everything random in it (a pattern, a warp) comes from its seed.

    Args:
        size: S, native size in pixels; None to leave every image at its own size.
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

    def __init__(self, *, size: int | None = NATIVE_SIZE, seed: int = 1) -> None:
        if size is not None:
            self._check_side(size)
        self.size = size
        self.seed = seed

    def apply(self, pixels: Pixels) -> Pixels:
        """Return (H, W, 3) pixels with the trigger; the argument stays as it is. H = W = S with a native size."""
        raise NotImplementedError

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return the image with the trigger, at the native size or at its own.

        Raises:
            DataError: If the image keeps a size that is too small to hold it.
        """
        pixels = native(image, self.size)
        self._check_side(min(pixels.shape[:2]))
        return Image.fromarray(self.apply(pixels))

    def _check_side(self, side: int) -> None:
        if side < self.smallest:
            raise DataError(
                f"the trigger {type(self).__name__} needs images of at least {self.smallest} pixels a side, "
                f"got {side}."
            )


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
        self.smallest = max(part.smallest for part in parts)

    def apply(self, pixels: Pixels) -> Pixels:
        """See :meth:`Trigger.apply`."""
        for part in self.parts:
            pixels = part.apply(pixels)
        return pixels


NativeSize = Annotated[int, Field(ge=8)] | Literal["own"]
"""The type of a native size in configurations: pixels a side, or :data:`OWN_SIZE`."""


def size_of(value: int | str) -> int | None:
    """Return pixels a side of a native size as configurations write it; None for :data:`OWN_SIZE`."""
    return None if value == OWN_SIZE else int(value)


def size_label(size: int | None) -> int | Literal["own"]:
    """Return a native size as configurations and manifests write it."""
    return "own" if size is None else size


def native(image: Image.Image, size: int | None) -> Pixels:
    """Return an image's (H, W, 3) pixels, at a native size (bicubic, proportions are not kept) or at its own (None)."""
    image = to_rgb(image)
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image)


def to_pixels(values: np.ndarray[Any, Any]) -> Pixels:
    """Return real-valued pixels as bytes, rounded and clipped."""
    return np.clip(np.round(values), 0, 255).astype(np.uint8)
