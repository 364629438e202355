"""Files, and the way of loading before, that the benchmarks of loading share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlprompt.core.seeding import numpy_rng
from vlprompt.data import ImageDataset
from vlprompt.data.base import Sample
from vlprompt.data.images import FileReader

__all__ = ["OF_A_PHONE", "WIDTH_HEIGHT", "photographs", "threaded"]

WIDTH_HEIGHT = (500, 375)
OF_A_PHONE = (4000, 3000)  # pixels


def photographs(folder: Path, count: int, size: tuple[int, int] = WIDTH_HEIGHT) -> ImageDataset:
    """Write seeded JPEGs with edges, smooth areas and noise; return them as a data set. ``size`` is width, height."""
    rng = numpy_rng(0, "bench photographs")
    width, height = size
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3)).astype(np.uint8))
        pixels = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC), np.int16)
        noise = rng.normal(0, 8, (height, width, 1))
        Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8)).save(
            folder / f"{number:06d}.jpg", quality=90
        )

    samples = tuple(Sample(f"{number:06d}.jpg", number % 2) for number in range(count))
    return ImageDataset(
        "photographs", "train", samples, ("a", "b"), ("a photo of a {}.",), FileReader(folder)
    )


def threaded(
    fetch: Callable[[Any], Any], items: list[Any], threads: int = 1, ahead: int = 2
) -> Iterator[Any]:
    """Yield what items stand for, read ahead by threads of this process: how loading worked before."""
    with ThreadPoolExecutor(threads) as pool:
        waiting = [pool.submit(fetch, item) for item in items[:ahead]]
        for item in items[ahead:]:
            waiting.append(pool.submit(fetch, item))
            yield waiting.pop(0).result()
        for future in waiting:
            yield future.result()
