"""One image of what scenes look like: a labelled row per task and per style."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from vlprompt.data.scenes.attributes import STYLES
from vlprompt.data.scenes.tasks import build, list_tasks

__all__ = ["contact_sheet"]

_LABEL_HEIGHT = 12
_GAP = 4
_MARGIN_WIDTH = 92  # pixels


def contact_sheet(
    tasks: Sequence[str] | None = None,
    styles: Sequence[str] = STYLES[1:],
    *,
    columns: int = 12,
    size: int = 64,
    split: str = "train",
) -> Image.Image:
    """Draw rows of images with their class names.

    Args:
        tasks: A row each in plain style; default: all tasks.
        styles: A row each of the task "shape", after the tasks.
        columns: Images per row.
        size: Side of an image in pixels.
        split: Split the images are from.

    Returns:
        The sheet.
    """
    rows = [(task, "plain") for task in (list_tasks() if tasks is None else tasks)]
    rows += [("shape", style) for style in styles]
    height = size + _LABEL_HEIGHT + _GAP
    sheet = Image.new("RGB", (_MARGIN_WIDTH + columns * (size + _GAP), len(rows) * height + _GAP), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(10)

    for number, (task, style) in enumerate(rows):
        data = build(task, split, style, size)
        top = number * height + _GAP
        pen.text((4, top + size // 2 - 8), task if style == "plain" else f"@{style}", "black", font)
        for column in range(min(columns, len(data))):
            image, label = data[column]
            left = _MARGIN_WIDTH + column * (size + _GAP)
            sheet.paste(image, (left, top))
            pen.text((left, top + size), _fit(data.classnames[label], size, font), "black", font)

    return sheet


def _fit(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Cut a label so that it stays under its image."""
    while font.getlength(text) > width:
        text = text[:-2].rstrip() + "."
    return text
