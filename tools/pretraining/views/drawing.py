"""A view by its number: pixels as a camera would leave them, and what can be asked of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from pretraining.views.canvas import Canvas, noise
from pretraining.views.closeups import cells, cracks, retina, room, skin
from pretraining.views.outdoors import coast, field, house_front, street
from vlprompt.core.seeding import numpy_rng

__all__ = ["WORDS", "View", "drawn_view"]

#: What phrases call the things of :class:`Canvas`.
WORDS: dict[str, tuple[str, ...]] = {
    "sky": ("sky",),
    "cloud": ("cloud", "clouds"),
    "building": ("building", "buildings"),
    "house": ("house", "houses"),
    "roof": ("roof",),
    "wall": ("wall",),
    "window": ("window", "windows"),
    "door": ("door",),
    "grass": ("grass", "lawn", "meadow"),
    "sand": ("sand", "beach"),
    "snow": ("snow",),
    "soil": ("soil", "earth", "ground"),
    "mountain": ("mountain", "mountains", "hill"),
    "forest": ("forest", "wood"),
    "tree": ("tree", "trees"),
    "trunk": ("trunk",),
    "bush": ("bush", "shrub"),
    "water": ("water", "sea", "lake"),
    "road": ("road", "street"),
    "pavement": ("pavement", "sidewalk", "footpath"),
    "road marking": ("road marking", "lane marking"),
    "car": ("car", "cars", "automobile"),
    "bus": ("bus",),
    "truck": ("truck", "lorry"),
    "vehicle": ("vehicle", "vehicles"),
    "wheel": ("wheel", "wheels"),
    "person": ("person", "people", "pedestrian", "man", "woman"),
    "pole": ("pole", "post"),
    "sign": ("sign", "traffic sign"),
    "traffic light": ("traffic light",),
    "boat": ("boat", "ship"),
    "sail": ("sail",),
    "floor": ("floor",),
    "ceiling": ("ceiling",),
    "table": ("table",),
    "retina": ("retina", "fundus"),
    "optic disc": ("optic disc", "optic disk"),
    "vessel": ("blood vessels", "blood vessel", "vessels", "vessel", "veins", "retinal vessels"),
    "lesion": ("lesion", "skin lesion"),
    "mole": ("mole", "melanoma"),
    "skin": ("skin",),
    "polyp": ("polyp", "polyps"),
    "cell": ("cell", "cells"),
    "nucleus": ("nucleus", "nuclei"),
    "crack": ("crack", "cracks"),
}

_KINDS: tuple[tuple[Callable[[Canvas], None], float], ...] = (
    (street, 0.42),
    (field, 0.14),
    (house_front, 0.1),
    (coast, 0.08),
    (room, 0.06),
    (retina, 0.1),
    (skin, 0.04),
    (cells, 0.03),
    (cracks, 0.03),
)
_SMALLEST = 0.003  # share of the image that a thing must fill to be asked for


@dataclass(frozen=True)
class View:
    """A drawn view.

    Attributes:
        image: (side, side, 3) uint8.
        masks: Name of a thing to what is seen of it, (side, side) bool; a name of :data:`WORDS`.
    """

    image: NDArray[np.uint8]
    masks: dict[str, NDArray[np.bool_]]


def drawn_view(seed: int, index: int, side: int = 224) -> View:
    """Return the view of a number.

    Args:
        seed: Of all draws.
        index: The number.
        side: Pixels, 512 at most.
    """
    rng = numpy_rng(seed, "views", index)
    canvas = Canvas(side, rng)
    draws, shares = zip(*_KINDS, strict=True)
    draws[int(rng.choice(len(draws), p=shares))](canvas)

    image = _photographed(canvas)
    flip = rng.random() < 0.5
    image = image[:, ::-1] if flip else image
    least = _SMALLEST * side * side
    masks = {n: m[:, ::-1] if flip else m for n, m in canvas.masks.items() if m.sum() >= least}
    return View(np.ascontiguousarray(image), {n: np.ascontiguousarray(m) for n, m in masks.items()})


def _photographed(canvas: Canvas) -> NDArray[np.uint8]:
    """Return the pixels with a camera's light, colour, blur and grain."""
    rng = canvas.rng
    pixels = np.clip(canvas.pixels, 0, 1)
    pixels = pixels ** float(np.exp(rng.normal(0, 0.25)))
    pixels = pixels * np.exp(rng.normal(0, 0.06, 3)).astype(np.float32) * float(rng.uniform(0.7, 1.15))
    grey = pixels.mean(2, keepdims=True)
    pixels = grey + (pixels - grey) * float(rng.uniform(0.4, 1.2))
    if rng.random() < 0.3:
        light = 1 + 0.25 * noise(rng, canvas.side, 2)[..., None]
        pixels = pixels * light

    image = Image.fromarray((np.clip(pixels, 0, 1) * 255).astype(np.uint8))
    blurred = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0, 1.2)) * canvas.side / 224))
    grain = rng.standard_normal((canvas.side, canvas.side, 1), np.float32) * np.float32(rng.uniform(0, 8))
    return np.clip(np.asarray(blurred, np.float32) + grain, 0, 255).astype(np.uint8)
