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

__all__ = ["SceneConcept", "scene_concept_names", "scene_concepts"]

_SEED = 2025


@dataclass(frozen=True)
class SceneConcept:
    """One large object in the middle of several calm grounds.

    Attributes:
        name: What it is, for people: colour, shape and pattern.
        word: Its shape, where a search starts.
        images: Images to learn it from.
        held_out: Other images of it, to score with.
    """

    name: str
    word: str
    images: tuple[Image.Image, ...]
    held_out: tuple[Image.Image, ...]


def scene_concepts(
    count: int, split: str = "test", images: int = 4, held_out: int = 16, size: int = 64
) -> list[SceneConcept]:
    """Return concepts of unlike shapes, each a combination of shape and colour held out of all pretraining.

    Args:
        count: How many.
        split: ``"val"`` (to choose settings on) or ``"test"``; no combination is in both.
        images: Images to learn from.
        held_out: Images to score with.
        size: Side in pixels.

    Raises:
        UnknownNameError: For another split.
        DataError: If there are not so many.
    """
    return [_draw(shape, colour, images, held_out, size) for shape, colour in _choose(count, split)]


def scene_concept_names(count: int, split: str = "test") -> list[str]:
    """Return the names of the concepts that :func:`scene_concepts` draws, without drawing them."""
    names = []
    for shape, colour in _choose(count, split):
        pattern, _ = _pattern(shape, colour)
        names.append(_name(shape, colour, pattern))
    return names


def _choose(count: int, split: str) -> list[tuple[str, str]]:
    """Return the (shape, colour) of each concept; no two share either."""
    check("split", split, ("val", "test"))
    rng = numpy_rng(_SEED, "scenes", "concepts")
    pairs = sorted(pair for pair in held_out_pairs("shape_colour") if pair[0] in SHAPES)
    pairs = [pairs[i] for i in rng.permutation(len(pairs))]
    half = len(pairs) // 2
    candidates = pairs[half:] if split == "test" else pairs[:half]

    chosen: list[tuple[str, str]] = []
    for pair in candidates:
        if all(pair[0] != shape and pair[1] != colour for shape, colour in chosen):
            chosen.append(pair)
    if not 1 <= count <= len(chosen):
        raise DataError(f"scenes have {len(chosen)} {split} concepts of unlike shapes; got count {count}.")
    return chosen[:count]


def _draw(shape: str, colour: str, images: int, held_out: int, size: int) -> SceneConcept:
    pattern, rng = _pattern(shape, colour)
    samples = []
    for _ in range(images + held_out):
        look: dict[str, Any] = {"shape": shape, "colour": colour, "pattern": pattern}
        item = draw_object(rng, **look, size="large", position="center")
        ground = ("plain", "gradient")[int(rng.integers(2))]
        pixels = render(draw_scene(rng, [item], background=ground), size).image
        samples.append(Image.fromarray(np.asarray(pixels)))
    return SceneConcept(
        name=_name(shape, colour, pattern),
        word=words("shape", shape)[0],
        images=tuple(samples[:images]),
        held_out=tuple(samples[images:]),
    )


def _pattern(shape: str, colour: str) -> tuple[str, np.random.Generator]:
    """Return the concept's pattern, and the generator that goes on to draw its images."""
    rng = numpy_rng(_SEED, "scenes", "concept", shape, colour)
    return PATTERNS[int(rng.integers(len(PATTERNS)))], rng


def _name(shape: str, colour: str, pattern: str) -> str:
    return f"{words('colour', colour)[0]} {words('shape', shape)[0]}, {words('pattern', pattern)[0]}"
