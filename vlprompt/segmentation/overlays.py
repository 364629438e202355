"""Masks laid over their images, one by one and on sheets."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from vlprompt.data.segmentation.base import IGNORE, MaskedImage

__all__ = ["Sheet", "overlay"]

_TRUE_COLOUR = (16, 185, 129)
_PREDICTED_COLOUR = (239, 68, 68)
_LONGEST_PHRASE = 25  # characters below an image


def overlay(
    image: Image.Image,
    mask: NDArray[Any],
    colour: tuple[int, int, int] = _PREDICTED_COLOUR,
    share: float = 0.45,
) -> Image.Image:
    """Return an image with a mask's pixels tinted and its border drawn; pixels that don't count (255) turn grey.

    Args:
        image: RGB.
        mask: (H, W) bool, or 0, 1 and 255.
        colour: Of the mask, 0 to 255.
        share: Of the tint in the colour of a pixel, in [0, 1].
    """
    pixels = np.asarray(image.convert("RGB"), np.float32).copy()
    inside = np.asarray(mask) == 1
    border = inside & ~ndimage.binary_erosion(inside)

    pixels[inside] = (1 - share) * pixels[inside] + share * np.asarray(colour, np.float32)
    pixels[border] = colour
    if mask.dtype != bool:
        pixels[np.asarray(mask) == IGNORE] = 128
    return Image.fromarray(pixels.round().astype(np.uint8))


class Sheet:
    """A grid of images: a row per pair, a column for the image, for the true mask, and for each method.

    Args:
        pairs: One for each row.
    """

    def __init__(self, pairs: Sequence[MaskedImage]) -> None:
        self.pairs = list(pairs)
        self.columns: dict[str, list[Image.Image]] = {
            "image": [pair.image for pair in pairs],
            "truth": [overlay(pair.image, pair.mask, _TRUE_COLOUR) for pair in pairs],
        }

    def add(self, title: str, paths: Sequence[Path]) -> None:
        """Add a column of predicted masks.

        Args:
            title: Above the column.
            paths: A mask's file for each row, 0 outside and 255 inside, of the image's size.
        """
        images = []
        for pair, path in zip(self.pairs, paths, strict=True):
            mask = np.asarray(Image.open(path)) > 0
            images.append(overlay(pair.image, mask))
        self.columns[title] = images

    def write(self, path: Path) -> None:
        """Write the sheet as PNG."""
        rows = len(self.pairs)
        columns = len(self.columns)

        # Phrases and labels may hold dollar signs, which are no formulas.
        with rc_context({"font.size": 8, "text.parse_math": False}):
            size = (1.35 * columns + 0.2, 1.5 * rows + 0.3)  # inches
            figure = Figure(figsize=size, layout="constrained", dpi=110)
            axes = figure.subplots(rows, columns, squeeze=False)

            for x, (title, images) in enumerate(self.columns.items()):
                axes[0][x].set_title(title, fontsize=8)
                for y, image in enumerate(images):
                    self._draw(axes[y][x], image, self.pairs[y].phrase if x == 0 else "")

            # Without the library's name and version in it, the file is the same on every machine of one environment.
            png = io.BytesIO()
            FigureCanvasAgg(figure).print_png(png, metadata={"Software": None})

        path.write_bytes(png.getvalue())

    @staticmethod
    def html(path: Path) -> str:
        """Return a written sheet as an ``<img>`` element that holds the whole file."""
        data = base64.b64encode(path.read_bytes()).decode()
        return f'<img alt="{escape(path.stem, quote=True)}" style="max-width:100%" src="data:image/png;base64,{data}">'

    @staticmethod
    def _draw(axis: Any, image: Image.Image, phrase: str) -> None:
        axis.imshow(np.asarray(image), interpolation="nearest")
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)

        if len(phrase) > _LONGEST_PHRASE:
            phrase = f"{phrase[:_LONGEST_PHRASE]}…"
        if phrase:
            axis.set_xlabel(phrase, fontsize=7)
