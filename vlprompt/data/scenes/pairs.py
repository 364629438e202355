"""Images with captions for pretraining, and with phrases and masks for segmentation."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlprompt.core.errors import DataError
from vlprompt.core.seeding import numpy_rng
from vlprompt.data.scenes.attributes import HELD_OUT_STYLES, SIZES, STYLES
from vlprompt.data.scenes.captions import Caption, caption, facts, phrase
from vlprompt.data.scenes.render import render
from vlprompt.data.scenes.spec import SceneObject, SceneSpec, draw_object, draw_scene

__all__ = [
    "CaptionPairs",
    "MaskedScenes",
    "PhraseMask",
    "caption_pairs",
    "draw_pair",
    "draw_several",
    "masks",
]

Rng = np.random.Generator


@dataclass(frozen=True)
class CaptionPairs:
    """A sequence of (image, caption).

    Attributes:
        count: How many.
        seed: Seeds scenes and captions.
        holdout: Leave out what pretraining must never see; otherwise anything may occur.
        size: Side in pixels.
        easy: So many first items show one large object in the middle of a calm ground, with captions that name
            its shape and perhaps its colour; a curriculum starts with them.
        balanced: More captions are about a single attribute, and all attributes get their share of those.
    """

    count: int
    seed: int = 0
    holdout: bool = True
    size: int = 64
    easy: int = 0
    balanced: bool = False

    def __post_init__(self) -> None:
        if self.count < 1 or self.size < 16:
            raise DataError(
                f"caption pairs: got count {self.count} and size {self.size}; allowed: >= 1 and >= 16."
            )

    def __len__(self) -> int:
        return self.count

    def spec(self, index: int) -> SceneSpec:
        """Return the scene of one item."""
        if not 0 <= index < self.count:
            raise IndexError(index)

        # A generator for each item: any of them can be drawn without those before it.
        rng = numpy_rng(self.seed, "scenes", "pairs", self.holdout, index)
        if index < self.easy:
            pattern = ("solid", "gradient", "split", "outlined")[int(rng.integers(4))]
            item = draw_object(rng, seen_only=self.holdout, size="large", position="center", pattern=pattern)
            return draw_scene(rng, [item], background=("plain", "gradient")[int(rng.integers(2))])

        styles = [s for s in STYLES[1:] if not (self.holdout and s in HELD_OUT_STYLES)]
        style = "plain" if rng.random() < 0.5 else styles[int(rng.integers(len(styles)))]
        kind = rng.random()
        if kind < 0.7:
            objects = [draw_object(rng, seen_only=self.holdout, position=_random_position(rng))]
        elif kind < 0.85:
            objects = draw_several(rng, int(rng.integers(2, 6)), seen_only=self.holdout)
        else:
            objects = draw_pair(rng, seen_only=self.holdout)

        return draw_scene(rng, objects, style=style)

    def captions(self, index: int, count: int = 1) -> list[Caption]:
        """Return captions of an item; without ``holdout``, every second one uses held-out wordings."""
        spec = self.spec(index)
        rng = numpy_rng(self.seed, "scenes", "caption", self.holdout, index)
        return [
            caption(
                spec,
                rng,
                held_out=not self.holdout and draw % 2 == 1,
                simple=index < self.easy,
                balanced=self.balanced,
            )
            for draw in range(count)
        ]

    def facts(self, index: int) -> frozenset[str]:
        """Return all that captions could truly say of an item."""
        return facts(self.spec(index))

    def __getitem__(self, index: int) -> tuple[Image.Image, str]:
        return Image.fromarray(render(self.spec(index), self.size).image), self.captions(index)[0].text


@dataclass(frozen=True)
class PhraseMask:
    """One object of an image, named so that only it is meant.

    Attributes:
        image: The image.
        phrase: For example ``"red circle"``.
        mask: (H, W) bool, its visible pixels.
        box: (4,) float32, x0 y0 x1 y1 in pixels.
    """

    image: Image.Image
    phrase: str
    mask: NDArray[np.bool_]
    box: NDArray[np.float32]


@dataclass(frozen=True)
class MaskedScenes:
    """A sequence of :class:`PhraseMask`: scenes of one to three unlike objects, one of them named.

    Attributes:
        count: How many.
        seed: Seeds everything.
        split: Any name; other names draw other scenes.
        style: Render style.
        size: Side in pixels.
    """

    count: int
    seed: int = 0
    split: str = "train"
    style: str = "plain"
    size: int = 64

    def __len__(self) -> int:
        return self.count

    def spec(self, index: int) -> SceneSpec:
        """Return the scene of one item; the first of ``objects`` is the one that is named."""
        if not 0 <= index < self.count:
            raise IndexError(index)

        rng = numpy_rng(self.seed, "scenes", "masks", self.split, index)
        objects = [draw_object(rng, size="large" if rng.random() < 0.4 else "medium")]
        wanted = int(rng.integers(1, 4))

        # A fixed number of attempts: the stream of random numbers has the same length in every scene.
        for _ in range(30):
            other = draw_object(rng, size="medium")
            clear = all(np.hypot(o.x - other.x, o.y - other.y) > o.radius + other.radius for o in objects)
            if len(objects) < wanted and clear and all(o.shape != other.shape for o in objects):
                objects.append(other)

        return draw_scene(rng, objects, style=self.style)

    def __getitem__(self, index: int) -> PhraseMask:
        spec = self.spec(index)
        rendered = render(spec, self.size)
        words = phrase(spec.objects[0], ("colour",))
        return PhraseMask(Image.fromarray(rendered.image), words, rendered.masks[0], rendered.boxes[0])


def caption_pairs(
    count: int, seed: int = 0, *, holdout: bool = True, size: int = 64, easy: int = 0
) -> CaptionPairs:
    """Return images with captions (see :class:`CaptionPairs`)."""
    return CaptionPairs(count, seed, holdout, size, easy)


def masks(
    count: int, seed: int = 0, *, split: str = "train", style: str = "plain", size: int = 64
) -> MaskedScenes:
    """Return images with a phrase, its mask and its box (see :class:`MaskedScenes`)."""
    return MaskedScenes(count, seed, split, style, size)


def draw_several(rng: Rng, count: int, *, seen_only: bool = False, **fixed: Any) -> list[SceneObject]:
    """Draw like objects in cells of a 3 x 3 grid; all share a shape, most also colour and pattern."""
    first = draw_object(rng, seen_only=seen_only, size="small", **fixed)
    look = {"shape": first.shape}
    if rng.random() < 0.7:
        look["colour"] = first.colour

    if rng.random() < 0.7:
        look["pattern"] = first.pattern

    out = []
    for cell in rng.permutation(9)[:count]:
        x, y = (
            float((c + 0.5) / 3 + d)
            for c, d in zip(divmod(cell, 3), rng.uniform(-0.02, 0.02, 2), strict=True)
        )
        radius = float(rng.uniform(0.11, 0.14))
        out.append(draw_object(rng, seen_only=seen_only, **{**fixed, **look}, radius=radius, x=x, y=y))

    return out


def draw_pair(
    rng: Rng, *, seen_only: bool = False, shapes: tuple[str, str] | None = None, upright: bool | None = None
) -> list[SceneObject]:
    """Draw two unlike objects side by side or one above the other; often one is clearly larger."""
    upright = bool(rng.random() < 0.5) if upright is None else upright
    near, far = ("small", "medium") if rng.random() < 0.6 else ("medium", "medium")
    order = rng.permutation(2)

    out: list[SceneObject] = []
    while len(out) < 2:
        along = (0.26, 0.74)[len(out)] + float(rng.uniform(-0.02, 0.02))
        across = 0.5 + float(rng.uniform(-0.1, 0.1))
        x, y = (across, along) if upright else (along, across)
        radius = float(rng.uniform(*SIZES[(near, far)[order[len(out)]]]))
        fixed = {"shape": shapes[len(out)]} if shapes else {}
        item = draw_object(rng, seen_only=seen_only, radius=radius, x=x, y=y, **fixed)
        if not out or (item.shape != out[0].shape and item.colour != out[0].colour):
            out.append(item)

    return out


def _random_position(rng: Rng) -> str | None:
    """Less than half of the single objects lie at one of the nine places, the others anywhere."""
    return None if rng.random() < 0.6 else _PLACES[int(rng.integers(9))]


_PLACES = (
    "top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right",
)  # fmt: skip


def throughput(seconds: float = 1.0, size: int = 64) -> float:
    """Draw and caption scenes for a while on this core.

    Args:
        seconds: How long, at least.
        size: Side in pixels.

    Returns:
        Images per second.
    """
    pairs = CaptionPairs(1_000_000, 0, False, size)
    done = 0
    started = time.perf_counter()
    while (passed := time.perf_counter() - started) < seconds or done == 0:
        _ = pairs[done]
        done += 1
    return done / passed
