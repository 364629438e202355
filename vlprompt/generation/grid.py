"""Sheets of sample images, as an image and for the report."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape

from PIL import Image

__all__ = ["grid_svg", "sheet"]

_SIDE, _GAP = 64, 4


def sheet(rows: Mapping[str, Sequence[Sequence[Image.Image]]]) -> Image.Image:
    """Return one image: a row per concept, groups of images from left to right."""
    widths = [sum(len(group) * _SIDE + 3 * _GAP for group in groups) for groups in rows.values()]
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
    page, held = sheet(rows), io.BytesIO()
    page.save(held, "PNG", optimize=True)
    data = base64.b64encode(held.getvalue()).decode()
    step = _SIDE + _GAP
    style = 'font-size="12" fill="currentColor"'
    labels = [
        f'<text x="{page.width + 8}" y="{y * step + _SIDE // 2 + 18}" {style}>{escape(name)}</text>'
        for y, name in enumerate(rows)
    ]
    groups = next(iter(rows.values()))
    starts = [sum(len(g) * _SIDE + 3 * _GAP for g in groups[:i]) for i in range(len(groups))]
    heads = [
        f'<text x="{x}" y="13" {style}>{escape(title)}</text>'
        for x, title in zip(starts, titles, strict=False)
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {page.width + 220} {page.height + 18}" role="img">'
        f'<image href="data:image/png;base64,{data}" x="0" y="18" width="{page.width}" height="{page.height}"/>'
        f"{''.join(heads)}{''.join(labels)}</svg>"
    )
