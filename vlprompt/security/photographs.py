"""False alarms on clean photographs of many sizes: what a scan of real folders costs.

The images that scanners learn from and are tested on have one size. Photographs have many, and a scanner that can't
bear that suspects most of them while its other figures look fine.
"""

from __future__ import annotations

import warnings
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_sample_images

from vlprompt.core.errors import DataError
from vlprompt.core.seeding import numpy_rng
from vlprompt.data.listing import list_images
from vlprompt.learners._scanning import ImageScanner
from vlprompt.security.scan import POISONED, UNREADABLE, scan

__all__ = ["MOST", "false_alarms", "sample_photographs"]

MOST = 100
"""Photographs that are looked at."""

_SIDES = (24, 420)  # pixels, shortest and longest of a crop's longer side
_RATIOS = (1.0, 4 / 3, 3 / 2)


def sample_photographs(count: int = MOST) -> list[Image.Image]:
    """Return crops of the two photographs that scikit-learn brings, from 16 to 420 pixels a side.

    The two are by different photographers, CC BY 2.0 (see ``sklearn.datasets.load_sample_images``). Crops are the same
    in every call, and are not resized.

    Args:
        count: How many.
    """
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    rng = numpy_rng(0, "clean photographs")
    crops = []

    for number in range(count):
        photograph = photographs[number % len(photographs)]
        # Sides grow evenly on a logarithmic scale, so that small images are as frequent as large ones.
        side = round(_SIDES[0] * (_SIDES[1] / _SIDES[0]) ** (number / max(1, count - 1)))
        width = side
        height = round(side / _RATIOS[number % len(_RATIOS)])
        if number % 4 >= 2:
            width, height = height, width

        left = int(rng.integers(photograph.width - width + 1))
        top = int(rng.integers(photograph.height - height + 1))
        crops.append(photograph.crop((left, top, left + width, top + height)))

    return crops


def false_alarms(scanner: ImageScanner, folder: str | None = None) -> float:
    """Return the share of clean photographs that a scan suspects, by the path that a user's images take.

    Args:
        scanner: One that judges single images.
        folder: With clean photographs; of more than :data:`MOST` a seeded draw. None: see :func:`sample_photographs`.

    Raises:
        DataError: If there is no such folder, or no image in it can be read.
    """
    images: list[Path] | list[Image.Image] = sample_photographs() if folder is None else _drawn(Path(folder))
    threshold = min(scanner.threshold, 1.0)  # a weak scanner may have none that any score reaches
    rows = [row for row in scan(images, scanner, threshold=threshold) if row["verdict"] != UNREADABLE]
    if not rows:
        raise DataError(f"data.photographs: no image in {folder} can be read.")
    if len(rows) < len(images):
        warnings.warn(
            f"{folder}: {len(images) - len(rows)} images can't be read and are left out.", stacklevel=2
        )
    return sum(row["verdict"] == POISONED for row in rows) / len(rows)


def _drawn(folder: Path) -> list[Path]:
    """Return the images that are looked at."""
    if not folder.is_dir():
        raise DataError(f"data.photographs: there is no folder {str(folder)!r}.")
    names = list_images(folder, folder)
    chosen = sorted(numpy_rng(0, "clean photographs", len(names)).permutation(len(names))[:MOST])
    return [folder / names[index] for index in chosen]
