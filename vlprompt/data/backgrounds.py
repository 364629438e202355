"""Clean images of many kinds and sizes, offline: what scanners must not suspect though nobody trained on it.

They are cut from the two photographs that scikit-learn brings (CC BY 2.0, see ``sklearn.datasets.load_sample_images``),
or drawn, and took one of the ways in which images come about: reduced with some filter, cut out at the camera's own
pixels, enlarged; stored as JPEG, noisy, dark.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from vlprompt.core.seeding import numpy_rng

__all__ = ["background_images"]

_SIDES = (20, 400)  # pixels, least and largest of the longer side
_LEAST = 16  # pixels of the shorter side
_FILTERS = (
    Image.Resampling.BICUBIC,
    Image.Resampling.LANCZOS,
    Image.Resampling.BILINEAR,
    Image.Resampling.BOX,
)


def background_images(count: int, seed: int = 1) -> list[Image.Image]:
    """Return clean images; the first of a longer list are those of a shorter one.

    Args:
        count: How many.
        seed: Of everything drawn.
    """
    from sklearn.datasets import load_sample_images  # takes a second, which nobody else should wait for

    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    rng = numpy_rng(seed, "backgrounds")
    return [_image(photographs, rng) for _ in range(count)]


def _image(photographs: Sequence[Image.Image], rng: np.random.Generator) -> Image.Image:
    least, largest = _SIDES
    longer = round(least * (largest / least) ** rng.random())
    shorter = max(_LEAST, round(longer * rng.uniform(0.65, 1.0)))
    width, height = (longer, shorter) if rng.random() < 0.5 else (shorter, longer)

    way = rng.random()
    if way < 0.15:
        image = _drawn(rng, width, height)
    else:
        image = _cut(photographs[int(rng.integers(len(photographs)))], rng, width, height, way)

    values: NDArray[np.floating[Any]] = np.asarray(image).astype(np.float32)
    if rng.random() < 0.4:
        values = 128 + (values - 128) * rng.uniform(0.3, 1.3) + rng.uniform(-70, 50)
    if rng.random() < 0.3:
        values = values + rng.normal(0, rng.uniform(0.3, 5), values.shape)

    image = Image.fromarray(np.clip(values.round(), 0, 255).astype(np.uint8))
    return _jpeg(image, rng) if rng.random() < 0.4 else image


def _cut(
    photograph: Image.Image, rng: np.random.Generator, width: int, height: int, way: float
) -> Image.Image:
    """Return a part of a photograph: reduced (way < 0.6), at its own pixels (< 0.85) or enlarged."""
    if way < 0.6:
        most = max(1.01, min(photograph.width / width, photograph.height / height))
        factor = float(most ** rng.random())
    elif way < 0.85:
        factor = 1.0
    else:
        factor = float(rng.uniform(0.4, 1.0))

    across = min(photograph.width, max(8, round(width * factor)))
    down = min(photograph.height, max(8, round(height * factor)))
    left = int(rng.integers(photograph.width - across + 1))
    top = int(rng.integers(photograph.height - down + 1))
    part = photograph.crop((left, top, left + across, top + down))
    if rng.random() < 0.5:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return part.resize((width, height), _FILTERS[int(rng.integers(len(_FILTERS)))])


def _drawn(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Return flat shapes, reduced from four times their size."""
    across, down = 4 * width, 4 * height
    image = Image.new("RGB", (across, down), _colour(rng))
    pen = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(1, 8))):
        x, y = rng.uniform(0, 1, 2) * (across, down)
        reach = float(rng.uniform(0.03, 0.5)) * across
        box = (float(x) - reach, float(y) - reach, float(x) + reach, float(y) + reach)
        (pen.ellipse if rng.random() < 0.5 else pen.rectangle)(box, fill=_colour(rng))
    return image.resize((width, height), _FILTERS[int(rng.integers(len(_FILTERS)))])


def _colour(rng: np.random.Generator) -> tuple[int, int, int]:
    red, green, blue = rng.integers(0, 256, 3).tolist()
    return red, green, blue


def _jpeg(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=int(rng.integers(65, 99)), subsampling=int(rng.integers(0, 3)))
    file.seek(0)
    return Image.open(file).convert("RGB")
