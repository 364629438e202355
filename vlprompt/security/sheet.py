"""One image of what triggers look like: a row per trigger, and beside each image what changed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vlprompt.security.triggers import NATIVE_SIZE, create_trigger, list_triggers
from vlprompt.security.triggers.base import native

__all__ = ["trigger_sheet"]

_GAP, _MARGIN = 4, 110  # pixels
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
    sheet = Image.new("RGB", (_MARGIN + step * len(images), (side + _GAP) * (len(names) + 1) + _GAP), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    clean = [native(image, size).astype(int) for image in images]
    for row, name in enumerate(["clean", *names]):
        top = _GAP + row * (side + _GAP)
        pen.text((6, top + side // 2 - 6), name, "black", font)
        for column, pixels in enumerate(clean):
            left = _MARGIN + column * step
            shown = pixels.astype(np.uint8)
            if row:
                shown = create_trigger(name, size=size, seed=seed).apply(shown)
                change = np.clip(128 + _GAIN * (shown - pixels), 0, 255).astype(np.uint8)
                sheet.paste(_enlarged(change, side), (left + side + _GAP, top))
            sheet.paste(_enlarged(shown, side), (left, top))
    return sheet


def _enlarged(pixels: np.ndarray, side: int) -> Image.Image:
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
