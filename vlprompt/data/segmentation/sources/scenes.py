"""scenes/masks: drawn images of one to three objects, one of them named so that only it is meant; offline.

``scenes/masks-unseen`` names only objects whose shape and colour pretraining never showed together.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlprompt.core.errors import DataError
from vlprompt.data import scenes as drawn
from vlprompt.data.scenes.attributes import HELD_OUT_STYLES, held_out_pairs
from vlprompt.data.scenes.captions import phrase
from vlprompt.data.scenes.shapes import GLYPHS, SHAPES
from vlprompt.data.scenes.tasks import GENERATOR
from vlprompt.data.scenes.wording import words
from vlprompt.data.segmentation.base import MaskDataset, MaskReader, MaskSample
from vlprompt.data.segmentation.sources import pair_sources
from vlprompt.data.sources import Request
from vlprompt.data.sources.scenes import task_and_style

__all__ = ["TASKS", "SceneMasks", "build"]

SIZES = {
    "masks": {"train": 400, "val": 100, "test": 200},
    "masks-unseen": {"train": 100, "val": 50, "test": 100},
}
TASKS = tuple(SIZES)
_SEED = 2024


@dataclass(frozen=True)
class SceneMasks(MaskReader):
    """Draws images and masks; a source is (split, style, number).

    Attributes:
        size: Side in pixels.
    """

    size: int = 64

    def read(self, source: tuple[str, str, int]) -> Image.Image:
        """Return the image; a pure function of the source and the size."""
        return Image.fromarray(self._rendered(source).image)

    def key(self, source: tuple[str, str, int]) -> str:
        """Return a name of the image's content."""
        split, style, number = source
        return f"{GENERATOR}/masks@{style}/{split}/{number}/{self.size}px"

    def mask(self, sample: MaskSample, size: tuple[int, int]) -> NDArray[np.uint8]:
        """Return the visible pixels of the object that is named."""
        return self._rendered(sample.source).masks[0].astype(np.uint8)

    def _rendered(self, source: tuple[str, str, int]) -> drawn.Rendered:
        return _render(*source, self.size)


@pair_sources.register(
    "scenes", summary="drawn from a seed; offline", grammar="scenes/masks[@STYLE]", embedded=True
)
def build(request: Request, *, style: str | None = None, size: int = 64) -> MaskDataset:
    """Build one split.

    Args:
        request: ``argument`` is ``task`` or ``task@style``.
        style: Render style, if the name doesn't say it.
        size: Height and width in pixels.
    """
    task, look = task_and_style(request, style)
    if size < 16:
        raise DataError(f"{request.name}: size {size} is too small; allowed: 16 pixels and more.")

    pool = (*SHAPES, *GLYPHS)
    names = tuple(words("shape", s)[0] for s in pool)

    samples = []
    for number in _numbers(request.split, task):
        item = _scenes(request.split, look).spec(number).objects[0]
        words_of_object = phrase(item, ("colour",))
        record = f"{request.split}/{number}"
        source = (request.split, look, number)
        samples.append(MaskSample(source, (number,), words_of_object, pool.index(item.shape), record))

    info = {
        "source": "scenes", "generator": GENERATOR, "style": look, "size": size,
        "style_held_out": look in HELD_OUT_STYLES,
    }  # fmt: skip
    return MaskDataset(request.name, request.split, tuple(samples), names, SceneMasks(size), info)


@lru_cache(maxsize=8)
def _numbers(split: str, task: str) -> tuple[int, ...]:
    """Return the scenes of a split: the first ones, or the first ones that name a combination never shown before."""
    count = SIZES[task][split]
    if task == "masks":
        return tuple(range(count))

    pairs = held_out_pairs("shape_colour")
    number = 0
    numbers: list[int] = []
    scenes = _scenes(split, "plain")

    while len(numbers) < count:
        item = scenes.spec(number).objects[0]
        if (item.shape, item.colour) in pairs:
            numbers.append(number)
        number += 1

    return tuple(numbers)


def _scenes(split: str, style: str) -> drawn.pairs.MaskedScenes:
    return drawn.pairs.MaskedScenes(100_000, _SEED, split, style)


@lru_cache(maxsize=64)
def _render(split: str, style: str, number: int, size: int) -> drawn.Rendered:
    return drawn.render(_scenes(split, style).spec(number), size)
