"""Colours of 16 bits a channel: Pillow keeps the upper byte of each, so a 12-bit photograph would be almost black."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageFile

from vlprompt.core.pixels import ValueRange, range_of_values, scaled, turned

__all__ = ["DeepColours", "deep_colours"]

_CODECS = frozenset(("zip", "raw", "libtiff"))
# Pillow's name of a layout to the one that hands out the lower bytes instead: the order of the two bytes is turned.
_LOWER = {
    f"{channels};16{order}": f"{channels};16{other}"
    for channels in ("RGB", "RGBA", "RGBX")
    for order, other in (("L", "B"), ("B", "L"), ("N", "B" if sys.byteorder == "little" else "L"))
}
_GREY_ALPHA = "LA;16B"  # of PNG; read as four channels of a byte, it holds both bytes of both
_SAMPLES = (258, 284)  # TIFF's tags: bits of a sample, and whether channels lie in planes of their own
_PLANES = 2

Values = np.ndarray[Any, np.dtype[Any]]  # unsigned, of 16 bits


@dataclass(frozen=True)
class DeepColours:
    """The decoded channels of an image with 16 bits each.

    Attributes:
        image: The same with the upper bytes only; it knows what the file declares.
        values: (H, W) greys or (H, W, 3) colours.
        alpha: (H, W), None if nothing is transparent.
    """

    image: Image.Image
    values: Values
    alpha: Values | None

    def range(self, value_range: tuple[float, float] | None = None) -> ValueRange:
        """See :func:`vlprompt.core.pixels.range_of`; one range for all channels."""
        return range_of_values(self.image, self.values, value_range)

    def to_rgb(self, value_range: tuple[float, float] | None = None) -> Image.Image:
        """Return 8-bit RGB, upright and on white; see :func:`vlprompt.core.pixels.to_rgb`."""
        colours = Image.fromarray(scaled(self.values, self.range(value_range))).convert("RGB")
        if self.alpha is not None:
            white = Image.new("RGB", colours.size, "white")
            colours = Image.composite(colours, white, Image.fromarray((self.alpha >> 8).astype(np.uint8)))
        return turned(colours, self.image)


def deep_colours(image: Image.Image) -> DeepColours | None:
    """Return the channels of an opened image that has 16 bits in each; None for all others.

    Args:
        image: Opened, but not decoded yet: afterwards half of the bits are gone.

    Raises:
        ValueError: If Pillow would misread it; says why.
    """
    if not isinstance(image, ImageFile.ImageFile) or image.mode not in ("RGB", "RGBA") or not image.tile:
        return None
    if _is_in_wide_planes(image):
        raise ValueError(
            "it keeps 16 bits of each channel in a plane of its own; save it with interleaved channels"
        )

    layouts = {_layout(tile) for tile in image.tile}
    if len(layouts) != 1 or not {tile[0] for tile in image.tile} <= _CODECS:
        return None
    layout = layouts.pop()
    if layout == _GREY_ALPHA:
        decoded = _decoded(image, "RGBA")
        both = np.asarray(decoded).astype(np.uint16)
        return DeepColours(decoded, both[..., 0] << 8 | both[..., 1], both[..., 2] << 8 | both[..., 3])
    if layout not in _LOWER:
        return None

    decoded = _decoded(image, layout)
    upper = np.asarray(decoded).astype(np.uint16)
    channels = upper << 8 | np.asarray(_decoded(image, _LOWER[layout]))
    colours = channels[..., :3]
    if image.mode == "RGBA":
        return DeepColours(decoded, colours, channels[..., 3])
    return DeepColours(decoded, colours, _opaque(image, colours))


def _opaque(image: Image.Image, colours: Values) -> Values | None:
    """Return the opacity of an image in which one colour counts as transparent; None if there is no such colour."""
    colour = image.info.get("transparency")
    if not isinstance(colour, tuple) or len(colour) != 3:
        return None
    return np.where((colours == np.array(colour)).all(-1), 0, 65535).astype(np.uint16)


def _decoded(image: ImageFile.ImageFile, layout: str) -> Image.Image:
    """Return an image decoded from its file in a layout; TIFF is upright then, and says so."""
    file = image.fp
    if file is None:
        raise ValueError("its file is closed")
    position = file.tell()
    file.seek(0)
    data = file.read()
    file.seek(position)

    again = Image.open(io.BytesIO(data), formats=[str(image.format)])
    again.tile = [_relaid(tile, layout) for tile in again.tile]
    again.load()
    return again


def _layout(tile: Any) -> str:
    arguments = tile[3]
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def _relaid(tile: Any, layout: str) -> Any:
    """Return one part of a file, to be read in another layout."""
    arguments = (layout, *tile[3][1:]) if isinstance(tile[3], tuple) else layout
    parts = (*tile[:3], arguments)
    return parts if type(tile) is tuple else type(tile)(*parts)  # a named tuple since Pillow 11


def _is_in_wide_planes(image: ImageFile.ImageFile) -> bool:
    """Return whether it is a TIFF whose planes Pillow reads as bytes, or by halves."""
    tags = getattr(image, "tag_v2", None)  # TIFF only
    if tags is None or tags.get(_SAMPLES[1]) != _PLANES:
        return False
    bits = tags.get(_SAMPLES[0], (8,))
    return max(bits if isinstance(bits, tuple) else (bits,)) > 8
