"""Decoded images as 8-bit RGB: upright, on white, and with more than 8 bits scaled by a range that is named."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from vlprompt.core.errors import DataError

__all__ = [
    "ValueRange",
    "check_value_range",
    "is_deep",
    "orientation",
    "range_of",
    "range_of_values",
    "scaled",
    "to_rgb",
    "turned",
]

_ORIENTATION = 0x0112  # the EXIF tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# TIFF's tags: bits of a sample, and the smallest and largest value that a file says it holds.
_BITS = 258
_PHOTOMETRIC = 262
_WHITE_IS_ZERO = 0
_LIMITS = ((340, 341), (280, 281))

_TOPS = (255, 1023, 4095, 16383, 65535)  # largest values of 8, 10, 12, 14 and 16 bits


@dataclass(frozen=True)
class ValueRange:
    """The values of a grey image that become black and white.

    Attributes:
        low: What becomes 0.
        high: What becomes 255; above ``low``.
        origin: ``"declared"`` by the file, ``"measured"`` on its pixels, or ``"set"`` by the user.
    """

    low: float
    high: float
    origin: str

    def __str__(self) -> str:
        return f"values {self.low:g} to {self.high:g} ({self.origin}) scaled to 8 bits"


def check_value_range(value_range: Any, where: str) -> tuple[float, float] | None:
    """Return a range that a user set, None for none.

    Raises:
        DataError: If it is not two finite numbers, the smaller one first.
    """
    if value_range is None:
        return None

    numbers = list(value_range) if isinstance(value_range, (list, tuple)) else []
    is_numeric = all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in numbers)
    if len(numbers) != 2 or not is_numeric or not -math.inf < numbers[0] < numbers[1] < math.inf:
        raise DataError(
            f"{where}: value_range is two numbers, what becomes black and what becomes white, for example "
            f"[0, 4095]; got {value_range!r}."
        )
    return float(numbers[0]), float(numbers[1])


def to_rgb(image: Image.Image, value_range: tuple[float, float] | None = None) -> Image.Image:
    """Return a decoded image of any mode as 8-bit RGB.

    Its EXIF orientation is applied, white is put under transparency, more than 8 bits are scaled (see
    :func:`range_of`).

    Args:
        image: Any mode.
        value_range: Values that become black and white where there are more than 8 bits; None takes what the file
            declares, or what is measured.
    """
    rgb = _converted(turned(image, image), image, value_range)
    if rgb is image:
        return image
    # What was said of the old pixels (orientation, transparent colour) is no longer true.
    rgb.info = {}
    return rgb


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an image, 1 (upright) to 8; 1 too where the block is damaged or says nonsense."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except (
        Exception
    ):  # a damaged block raises what its parser met: struct.error, SyntaxError, OverflowError ...
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def is_deep(mode: str) -> bool:
    """Return whether a mode of Pillow holds greys of more than 8 bits."""
    return mode.startswith("I") or mode == "F"


def range_of(image: Image.Image, value_range: tuple[float, float] | None = None) -> ValueRange:
    """Return the range by which greys of more than 8 bits are scaled.

    What the user set comes first, then what the file declares (TIFF's sample limits and bits, PGM's largest value),
    then what is measured: integers from 0 take the smallest of 8, 10, 12, 14 or 16 bits that holds them, floats in
    [0, 1] and [-1, 1] that range, and everything else its smallest and largest value.

    Args:
        image: Mode ``I``, ``I;16...`` or ``F``, decoded.
        value_range: What the user set.
    """
    return range_of_values(image, np.asarray(image), value_range)


def range_of_values(
    image: Image.Image, values: np.ndarray[Any, Any], value_range: tuple[float, float] | None
) -> ValueRange:
    """Return the range of :func:`range_of` for an image whose values were decoded elsewhere."""
    if value_range is not None:
        return ValueRange(float(value_range[0]), float(value_range[1]), "set")
    return _declared(image) or _measured(values)


def turned(image: Image.Image, original: Image.Image) -> Image.Image:
    """Return an image upright, by the orientation that the file of ``original`` says."""
    turn = _TURNS.get(orientation(original))
    return image if turn is None else image.transpose(turn)


def _converted(
    turned: Image.Image, original: Image.Image, value_range: tuple[float, float] | None
) -> Image.Image:
    """Return an upright image as RGB; ``original`` knows what its file declares."""
    if turned.mode == "RGB" and "transparency" not in turned.info:
        return turned

    if is_deep(turned.mode):
        values = np.asarray(turned)
        greys = scaled(values, range_of(original, value_range))
        return Image.fromarray(255 - greys if _is_negative(original) else greys).convert("RGB")

    if turned.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in turned.info:
        coloured = turned.convert("RGBA")
        white = Image.new("RGBA", coloured.size, "white")
        return Image.alpha_composite(white, coloured).convert("RGB")

    return turned.convert("RGB")


def _declared(image: Image.Image) -> ValueRange | None:
    """Return the range that the image's file declares, if it does."""
    if image.format == "PPM" and image.mode != "F":
        return ValueRange(0.0, 65535.0, "declared")  # Pillow has stretched the file's largest value to it

    tags = getattr(image, "tag_v2", None)  # TIFF only
    if tags is None:
        return None

    for low_tag, high_tag in _LIMITS:
        high = _number(tags.get(high_tag))
        low = _number(tags.get(low_tag, 0))
        if low is not None and high is not None and low < high:
            return ValueRange(low, high, "declared")

    bits = _number(tags.get(_BITS))
    if image.mode.startswith("I;16") and bits is not None and 8 < bits < 16:
        return ValueRange(0.0, 2.0**bits - 1, "declared")
    return None


def _is_negative(image: Image.Image) -> bool:
    """Return whether the file says that 0 is white; Pillow heeds that up to 8 bits only."""
    tags = getattr(image, "tag_v2", None)  # TIFF only
    return tags is not None and tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO


def _number(value: Any) -> float | None:
    """Return a finite number of a tag, which may be a tuple with one for each channel."""
    if isinstance(value, tuple):
        value = value[0] if value else None
    try:
        number = float(value)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _measured(values: np.ndarray[Any, Any]) -> ValueRange:
    finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values
    if not finite.size:
        return ValueRange(0.0, 1.0, "measured")

    low = float(finite.min())
    high = float(finite.max())
    if values.dtype.kind == "f" and low >= -1 and high <= 1:
        return ValueRange(min(0.0, float(math.floor(low))), 1.0, "measured")

    if low >= 0:
        top = next((top for top in _TOPS if high <= top), high)
        return ValueRange(0.0, float(top), "measured")
    return ValueRange(low, high if high > low else low + 1, "measured")


def scaled(values: np.ndarray[Any, Any], limits: ValueRange) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return (H, W) greys or (H, W, 3) colours as bytes; Pillow's own conversion would clip them at 255."""
    whole = values.dtype.kind in "iu" and limits.low.is_integer() and limits.high.is_integer()
    if whole:
        low = int(limits.low)
        span = int(limits.high) - low
        scaled = (np.clip(values.astype(np.int64), low, low + span) - low) * 255 // span
        return scaled.astype(np.uint8)

    exact = np.nan_to_num(values.astype(np.float64), nan=limits.low, posinf=limits.high, neginf=limits.low)
    share = (np.clip(exact, limits.low, limits.high) - limits.low) / (limits.high - limits.low)
    return np.round(share * 255).astype(np.uint8)
