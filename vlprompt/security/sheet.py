"""One image of what triggers look like: a row per trigger, and beside each image what changed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vlprompt.data.triggers import NATIVE_SIZE, create_trigger, list_triggers
from vlprompt.data.triggers.base import native

__all__ = ["trigger_sheet"]

_GAP = 4  # pixels between images
_MARGIN = 110  # pixels, for names
_GAIN = 4  # differences are drawn this many times as strong, around grey


def trigger_sheet(
    images: Sequence[Image.Image],
    triggers: Sequence[str] | None = None,
    *,
    size: int = NATIVE_SIZE,
    seed: int = 1,
) -> Image.Image:
    """Draw every trigger on every image, with the difference from the clean one beside it.

    Args:
        images: A few images.
        triggers: Names; None for all.
        size: Native size in pixels.
        seed: Of the triggers.

    Returns:
        The sheet; images are enlarged without smoothing.
    """
    names = list_triggers() if triggers is None else list(triggers)
    zoom = max(1, 96 // size)
    side = zoom * size
    step = 2 * side + 3 * _GAP
    width = _MARGIN + step * len(images)
    height = (side + _GAP) * (len(names) + 1) + _GAP
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(11)

    clean = [native(image, size) for image in images]

    for row, name in enumerate(["clean", *names]):
        top = _GAP + row * (side + _GAP)
        pen.text((6, top + side // 2 - 6), name, "black", font)
        for column, pixels in enumerate(clean):
            left = _MARGIN + column * step
            if row == 0:
                sheet.paste(_enlarged(pixels, side), (left, top))
                continue
            triggered = create_trigger(name, size=size, seed=seed).apply(pixels)
            difference = triggered.astype(int) - pixels
            change = np.clip(128 + _GAIN * difference, 0, 255).astype(np.uint8)
            sheet.paste(_enlarged(triggered, side), (left, top))
            sheet.paste(_enlarged(change, side), (left + side + _GAP, top))

    return sheet


def _enlarged(pixels: np.ndarray, side: int) -> Image.Image:
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
