"""Concepts to personalise a generator with: one object that pretraining never saw, in a few scenes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from vlprompt.core.errors import DataError
from vlprompt.core.seeding import numpy_rng
from vlprompt.data.scenes.attributes import PATTERNS, check, held_out_pairs
from vlprompt.data.scenes.render import render
from vlprompt.data.scenes.shapes import SHAPES
from vlprompt.data.scenes.spec import draw_object, draw_scene
from vlprompt.data.scenes.wording import words

__all__ = ["SceneConcept", "scene_concepts"]

_SEED = 2025


@dataclass(frozen=True)
class SceneConcept:
    """One large object in the middle of several calm grounds.

    Attributes:
        name: What it is, for people: colour, shape and pattern.
        word: Its shape, which is all that a search is told.
        images: Images to learn it from.
        held: Other images of it, for scores.
    """

    name: str
    word: str
    images: tuple[Image.Image, ...]
    held: tuple[Image.Image, ...]


def scene_concepts(
    count: int, split: str = "test", images: int = 4, held: int = 16, size: int = 64
) -> list[SceneConcept]:
    """Return concepts of unlike shapes, each a combination of shape and colour held out of all pretraining.

    Args:
        count: How many.
        split: ``"val"`` (to choose settings on) or ``"test"``; no combination is in both.
        images: Images to learn from.
        held: Images to score with.
        size: Side in pixels.

    Raises:
        UnknownNameError: For another split.
        DataError: If there are not so many.
    """
    check("split", split, ("val", "test"))
    rng = numpy_rng(_SEED, "scenes", "concepts")
    pairs = sorted(pair for pair in held_out_pairs("shape_colour") if pair[0] in SHAPES)
    pairs = [pairs[i] for i in rng.permutation(len(pairs))]
    mine = pairs[len(pairs) // 2 :] if split == "test" else pairs[: len(pairs) // 2]
    chosen: list[tuple[str, str]] = []
    for pair in mine:
        if all(pair[0] != s and pair[1] != c for s, c in chosen):
            chosen.append(pair)
    if not 1 <= count <= len(chosen):
        raise DataError(f"scenes have {len(chosen)} {split} concepts of unlike shapes; got count {count}.")
    return [_draw(shape, colour, images, held, size) for shape, colour in chosen[:count]]


def _draw(shape: str, colour: str, images: int, held: int, size: int) -> SceneConcept:
    rng = numpy_rng(_SEED, "scenes", "concept", shape, colour)
    pattern = PATTERNS[int(rng.integers(len(PATTERNS)))]
    drawn = []
    for _ in range(images + held):
        look: dict[str, Any] = {"shape": shape, "colour": colour, "pattern": pattern}
        item = draw_object(rng, **look, size="large", position="center")
        ground = ("plain", "gradient")[int(rng.integers(2))]
        drawn.append(
            Image.fromarray(np.asarray(render(draw_scene(rng, [item], background=ground), size).image))
        )
    said = words("shape", shape)[0]
    return SceneConcept(
        f"{words('colour', colour)[0]} {said}, {words('pattern', pattern)[0]}",
        said,
        tuple(drawn[:images]),
        tuple(drawn[images:]),
    )
