"""Sheets of sample images, as an image and for the report."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape

from PIL import Image

__all__ = ["grid_svg", "sheet"]

_SIDE = 64  # of a sample, pixels
_GAP = 4  # between rows; three of them between groups


def sheet(rows: Mapping[str, Sequence[Sequence[Image.Image]]]) -> Image.Image:
    """Return one image: a row per concept, groups of images from left to right."""
    widths = [sum(map(_width, groups)) for groups in rows.values()]
    page = Image.new("RGB", (max(widths), len(rows) * (_SIDE + _GAP)), "white")

    for y, groups in enumerate(rows.values()):
        x = 0
        for group in groups:
            for image in group:
                page.paste(image.convert("RGB").resize((_SIDE, _SIDE)), (x, y * (_SIDE + _GAP)))
                x += _SIDE
            x += 3 * _GAP
    return page


def grid_svg(rows: Mapping[str, Sequence[Sequence[Image.Image]]], titles: Sequence[str]) -> str:
    """Return the sheet as SVG with the concepts' names and the groups' titles."""
    page = sheet(rows)
    png = io.BytesIO()
    page.save(png, "PNG", optimize=True)
    data = base64.b64encode(png.getvalue()).decode()

    style = 'font-size="12" fill="currentColor"'
    texts = []
    x = 0
    for title, group in zip(titles, next(iter(rows.values())), strict=False):
        texts.append(f'<text x="{x}" y="13" {style}>{escape(title)}</text>')
        x += _width(group)
    for row, name in enumerate(rows):
        y = row * (_SIDE + _GAP) + _SIDE // 2 + 18
        texts.append(f'<text x="{page.width + 8}" y="{y}" {style}>{escape(name)}</text>')

    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {page.width + 220} {page.height + 18}" role="img">'
        f'<image href="data:image/png;base64,{data}" x="0" y="18" width="{page.width}" height="{page.height}"/>'
        f"{''.join(texts)}</svg>"
    )


def _width(group: Sequence[Image.Image]) -> int:
    """Return the width of a group and the gap behind it, pixels."""
    return len(group) * _SIDE + 3 * _GAP
