"""Small copies of images, for pages that need no other file."""

from __future__ import annotations

import base64
import io

from PIL import Image

__all__ = ["data_uri"]

THUMBNAIL = 144  # longest side of a sample image, pixels


def data_uri(image: Image.Image) -> tuple[str, bool]:
    """Return an image as a PNG data URI, and whether its pixels should stay sharp when enlarged."""
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    out = io.BytesIO()
    small.save(out, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode(), max(small.size) <= 32
