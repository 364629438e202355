"""Small copies of images, for pages that need no other file."""

from __future__ import annotations

import base64
import io

from PIL import Image

__all__ = ["data_uri"]

THUMBNAIL = 144  # longest side of a sample image, pixels


def data_uri(image: Image.Image, longest: int = THUMBNAIL) -> tuple[str, bool]:
    """Return an image as a PNG data URI, and whether its pixels should stay sharp when enlarged.

    Args:
        image: Any.
        longest: Longest side of the copy, pixels.
    """
    small = image.convert("RGB")
    small.thumbnail((longest, longest))
    out = io.BytesIO()
    small.save(out, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode(), max(small.size) <= 32
