"""digits: scikit-learn's 1,797 handwritten digits, 8 x 8, enlarged until they look like pen strokes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
from PIL import Image

from vlprompt.core.errors import DataError, UnknownNameError
from vlprompt.data.base import ImageDataset, Reader
from vlprompt.data.sources import Request, sources
from vlprompt.data.splits import cut

__all__ = ["DigitsReader", "build"]

_INK = 16.0  # the largest value of a pixel in the data
_RECIPE = "1"  # goes into every key: change it when _draw draws other pixels
_LOOKS = ("dark_on_light", "light_on_dark")


@dataclass(frozen=True)
class DigitsReader(Reader):
    """Draws digit number ``source`` (0..1796).

    Attributes:
        size: Height and width in pixels.
        look: ``"dark_on_light"`` or ``"light_on_dark"``.
    """

    size: int = 64
    look: str = "dark_on_light"

    def read(self, source: int) -> Image.Image:
        """Return the image as RGB, (size, size)."""
        return _draw(_data()[0][source], self.size, self.look)

    def key(self, source: int) -> str:
        """Return a key of the digit's pixels and how they are drawn."""
        pixels = hashlib.sha256(_data()[0][source].astype(np.uint8).tobytes()).hexdigest()[:32]
        return f"digits:{_RECIPE}:{self.size}:{self.look}:{pixels}"


@sources.register("digits", summary="scikit-learn's 1,797 handwritten digits; offline", embedded=True)
def build(
    request: Request, *, size: int = 64, look: Literal["dark_on_light", "light_on_dark"] = "dark_on_light"
) -> ImageDataset:
    """Build one split of digits.

    Args:
        request: What is asked for.
        size: Height and width in pixels, 8 to 512.
        look: Ink on paper or chalk on a board.
    """
    card = request.need_card
    if look not in _LOOKS:
        raise UnknownNameError("look of digits", str(look), _LOOKS)
    if not isinstance(size, int) or not 8 <= size <= 512:
        raise DataError(f"digits: size must be 8 to 512 pixels; got {size!r}.")

    _, labels = _data()
    groups: dict[int, list[str]] = {}
    for index, label in enumerate(labels):
        groups.setdefault(int(label), []).append(f"{index:04d}")

    parts = cut(groups, card.source.options["shares"], "digits", card.classnames)
    samples = tuple(type(s)(int(s.source), s.label) for s in parts[request.split])
    info = {"source": "digits", "split_source": card.splits.otherwise}

    return ImageDataset(
        request.name, request.split, samples, card.classnames, card.templates, DigitsReader(size, look), info
    )


@cache
def _data() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return pixels (1797, 8, 8) in [0, 16] and labels (1797,)."""
    from sklearn.datasets import load_digits  # here, not above: importing scikit-learn takes most of a second

    bunch = load_digits()
    return bunch.images, bunch.target


def _draw(pixels: np.ndarray[Any, Any], size: int, look: str) -> Image.Image:
    """Enlarge (8, 8) ink to RGB: bicubic, then contrast, which turns slopes into the edges of strokes."""
    # Strokes touch the border: a blank ring rounds their ends.
    ink = np.pad(pixels / _INK, 1).astype(np.float32)
    field = np.asarray(Image.fromarray(ink).resize((size, size), Image.Resampling.BICUBIC))
    stroke = np.clip((field - 0.5) * 2.5 + 0.5, 0, 1)
    grey = 1 - stroke if look == "dark_on_light" else stroke
    return Image.fromarray(np.round(grey * 235 + 10).astype(np.uint8)).convert("RGB")
