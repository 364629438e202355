"""What an image is made of: a description from which pixels, masks, captions and labels all follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlprompt.data.scenes.attributes import (
    BACKGROUNDS,
    COLOURS,
    LIGHT_TONES,
    PATTERNS,
    POSITIONS,
    SIZES,
    STYLES,
    TONES,
    check,
    is_held_out,
)
from vlprompt.data.scenes.shapes import GLYPHS, SHAPES

__all__ = ["SceneObject", "SceneSpec", "draw_object", "draw_scene", "position_name", "size_name"]


@dataclass(frozen=True)
class SceneObject:
    """One object.

    Attributes:
        shape: A shape or glyph name.
        colour: A colour name.
        pattern: A surface pattern.
        radius: Fraction of the image's side.
        x: Centre, fraction of the side from the left.
        y: Centre, fraction of the side from the top.
        angle: Rotation in degrees.
    """

    shape: str
    colour: str
    pattern: str = "solid"
    radius: float = 0.3
    x: float = 0.5
    y: float = 0.5
    angle: float = 0.0

    def __post_init__(self) -> None:
        check("shape", self.shape, (*SHAPES, *GLYPHS))
        check("colour", self.colour, COLOURS)
        check("pattern", self.pattern, PATTERNS)


@dataclass(frozen=True)
class SceneSpec:
    """One image; equal specs give equal bytes.

    Attributes:
        objects: Painted in order, later ones on top.
        background: Kind of ground.
        tone: Colour of the ground.
        style: Render style.
        seed: Seeds handwriting, grain, phases of patterns and noise.
    """

    objects: tuple[SceneObject, ...]
    background: str = "plain"
    tone: str = "paper"
    style: str = "plain"
    seed: int = 0

    def __post_init__(self) -> None:
        check("background", self.background, BACKGROUNDS)
        check("tone", self.tone, TONES)
        check("style", self.style, STYLES)

    @property
    def is_dark(self) -> bool:
        """Whether the ground is dark."""
        return self.tone not in LIGHT_TONES


def size_name(item: SceneObject) -> str | None:
    """Return the size's name, or None between two sizes."""
    return next((name for name, (low, high) in SIZES.items() if low <= item.radius <= high), None)


def position_name(item: SceneObject, tolerance: float = 0.09) -> str | None:
    """Return the position's name, or None when the centre is not within ``tolerance`` of a place."""
    for name, (x, y) in POSITIONS.items():
        if abs(item.x - x) <= tolerance and abs(item.y - y) <= tolerance:
            return name
    return None


def draw_object(
    rng: np.random.Generator,
    *,
    shapes: Sequence[str] | None = None,
    seen_only: bool = False,
    **fixed: Any,
) -> SceneObject:
    """Draw one object; attributes that are passed by name stay fixed.

    Args:
        rng: Source of randomness.
        shapes: Shapes to choose from when none is fixed; default: all shapes and glyphs.
        seen_only: Never draw a combination that is held out of pretraining.
        fixed: Attributes of :class:`SceneObject`, and ``size`` or ``position`` by name.

    Returns:
        The object.
    """
    pool = tuple(shapes or (*SHAPES, *GLYPHS))
    size = str(fixed.pop("size", None) or rng.choice(["small", "medium", "medium", "large", "large"]))
    position = fixed.pop("position", None)
    radius = float(fixed.pop("radius", rng.uniform(*SIZES[size])))

    if position is None:
        margin = radius + 0.02
        x, y = (float(v) for v in rng.uniform(margin, max(margin, 1 - margin) + 1e-6, 2))
    else:
        x, y = (
            float(c + d) for c, d in zip(POSITIONS[str(position)], rng.uniform(-0.05, 0.05, 2), strict=True)
        )

    angle = float(rng.uniform(-14, 14))
    while True:
        look: dict[str, Any] = {
            "shape": pool[int(rng.integers(len(pool)))],
            "colour": list(COLOURS)[int(rng.integers(len(COLOURS)))],
            "pattern": PATTERNS[int(rng.integers(len(PATTERNS)))],
            **{k: v for k, v in fixed.items() if v is not None},
        }
        if not (seen_only and is_held_out(look["shape"], look["colour"], look["pattern"])):
            break

    return SceneObject(**{"radius": radius, "x": x, "y": y, "angle": angle, **look})


def draw_scene(
    rng: np.random.Generator,
    objects: Sequence[SceneObject],
    *,
    background: str | None = None,
    style: str = "plain",
) -> SceneSpec:
    """Put objects on a ground on which every one of them can be seen.

    Args:
        rng: Source of randomness.
        objects: The objects.
        background: Kind of ground; drawn when None.
        style: Render style.

    Returns:
        The spec.
    """
    contrast = {
        name: min((_contrast(COLOURS[o.colour], rgb) for o in objects), default=1.0)
        for name, rgb in TONES.items()
    }
    visible = [name for name, value in contrast.items() if value >= 0.28] or [
        max(contrast, key=lambda n: contrast[n])
    ]
    return SceneSpec(
        objects=tuple(objects),
        background=background or BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))],
        tone=visible[int(rng.integers(len(visible)))],
        style=style,
        seed=int(rng.integers(2**31)),
    )


def _contrast(a: Sequence[float], b: Sequence[float]) -> float:
    """Distance of two colours, weighted as eyes weigh them."""
    return float(np.sqrt(sum(w * (p - q) ** 2 for w, p, q in zip((0.3, 0.59, 0.11), a, b, strict=True))))
