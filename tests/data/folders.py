"""Small folders of images as people have them."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
from PIL import Image

__all__ = ["fill", "image", "tree"]


def image(seed: object, size: tuple[int, int] = (8, 6)) -> Image.Image:
    """Return noise; another seed gives another image."""
    rng = np.random.default_rng(zlib.crc32(repr(seed).encode()))
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def fill(folder: Path, count: int, ending: str = "png") -> None:
    """Write so many different images into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        image((folder.parts[-2:], number)).save(folder / f"{number:03d}.{ending}")


def tree(root: Path, *paths: str, count: int = 3) -> str:
    """Fill folders below a root; return the name of the data set."""
    for path in paths:
        fill(root / path, count)
    return f"folder:{root}"
