"""The cluster sheet: one page with images to see whether domains and pseudo-classes mean anything."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from vlprompt.core.errors import DataError
from vlprompt.core.files import write_text
from vlprompt.data.captions.store import CaptionStore
from vlprompt.data.thumbnails import data_uri
from vlprompt.meta.clusters import Hierarchy, PseudoClass

__all__ = ["write_sheet"]

_STYLE = """body{margin:2rem auto;max-width:1100px;padding:0 1rem;font:15px/1.5 system-ui,sans-serif;
background:#f6f7f9;color:#1c2330}
section{background:#fff;border:1px solid #e3e7ee;border-radius:12px;padding:1rem 1.2rem;margin-top:1rem}
h2{font-size:1.05rem;margin:0 0 .6rem}table{border-collapse:collapse;width:100%}td{padding:.25rem .6rem .25rem 0;
vertical-align:middle}td:first-child{width:15rem;overflow-wrap:anywhere}small{color:#667085}
img{width:56px;height:56px;object-fit:cover;border-radius:4px;margin-right:4px}"""


def write_sheet(
    path: Path,
    store: CaptionStore,
    hierarchy: Hierarchy,
    held_out: Sequence[int] = (),
    *,
    domains: int = 12,
    classes: int = 8,
    images: int = 6,
) -> None:
    """Write the page: per domain its largest pseudo-classes, each with the pairs nearest to its centre.

    Args:
        path: A name ending in ``.html``.
        store: The pairs.
        hierarchy: The domains and pseudo-classes.
        held_out: Domains that are validated on, to mark them.
        domains: How many are shown, the largest ones.
        classes: Pseudo-classes per domain.
        images: Per pseudo-class.

    Raises:
        CheckpointError: If the file can't be written.
    """
    numbers = sorted({c.domain for c in hierarchy.classes}, key=lambda d: -int((hierarchy.domain == d).sum()))

    sections = []
    for number in numbers[:domains]:
        members = sorted(hierarchy.of(number), key=lambda c: -len(c.rows))
        mark = ", held out" if number in held_out else ""
        size = int((hierarchy.domain == number).sum())
        rows = "".join(_row(store, member, images) for member in members[:classes])
        sections.append(
            f"<section><h2>Domain {number} <small>{size} pairs, {len(members)} pseudo-classes{mark}</small></h2>"
            f"<table>{rows}</table></section>"
        )

    text = (
        f"{len(store)} pairs, {len(numbers)} domains, {len(hierarchy.classes)} pseudo-classes; {hierarchy.dropped} "
        "left out because they are too small or their images and captions don't agree."
    )
    page = (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>Clusters</title>'
        f"<style>{_STYLE}</style></head><body><h1>Clusters</h1><p>{text}</p>{''.join(sections)}</body></html>"
    )
    write_text(path, page)


def _row(store: CaptionStore, pseudo_class: PseudoClass, images: int) -> str:
    """Return a table row: the name, the size, and the first images."""
    pieces = []
    for row in pseudo_class.rows[:images]:
        try:
            image = store.source.image(int(store.index[row]))
        except DataError:  # it could be read when the store was built, and is gone now
            continue
        source, _ = data_uri(image)
        pieces.append(f'<img src="{source}" alt="" title="{html.escape(store.caption(row), quote=True)}">')

    name = html.escape(pseudo_class.name)
    count = len(pseudo_class.rows)
    return f"<tr><td>{name}<br><small>{count} pairs</small></td><td>{''.join(pieces)}</td></tr>"
