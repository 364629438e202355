"""Outlines of shapes and strokes of glyphs, and their signed distance.

A shape is one or more closed loops of vertices, filled by the even-odd rule; a glyph is one or more open
strokes. Coordinates are (x, y) in [-1, 1], y downwards, and fill the unit disc's bounding box.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["GLYPHS", "SHAPES", "Loops", "glyph_strokes", "loops_distance", "strokes_distance"]

Array = NDArray[Any]
Loops = Sequence[Array]


def _points(*xy: tuple[float, float]) -> Array:
    return np.asarray(xy, np.float32)


def _arc(cx: float, cy: float, rx: float, ry: float, start: float, end: float, count: int = 9) -> Array:
    """Points on an ellipse from one angle to another (degrees, clockwise on the screen, 0 to the right)."""
    angle = np.radians(np.linspace(start, end, count, dtype=np.float32))
    return np.stack([cx + rx * np.cos(angle), cy + ry * np.sin(angle)], 1).astype(np.float32)


def _polygon(sides: int, turn: float = -90.0) -> Array:
    return _arc(0, 0, 1, 1, turn, turn + 360, sides + 1)[:-1]


def _star() -> Array:
    angle = np.radians(-90 + 36 * np.arange(10))
    radius = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], 1).astype(np.float32)


def _heart() -> Array:
    t = np.linspace(0, 2 * np.pi, 28, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x / 17, (y - 2.5) / 15], 1).astype(np.float32)


def _flower() -> Array:
    t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    radius = 0.72 + 0.28 * np.cos(6 * t)
    return np.stack([radius * np.cos(t), radius * np.sin(t)], 1).astype(np.float32)


def _cloud() -> Array:
    bumps = [
        _arc(-0.6, 0.2, 0.4, 0.4, 90, 250),
        _arc(-0.12, -0.2, 0.5, 0.45, 190, 320),
        _arc(0.55, 0.1, 0.45, 0.5, -80, 90),
    ]
    return np.concatenate(bumps)


def _cross(arm: float = 0.34) -> Array:
    a = arm
    return _points(
        (-a, -1),
        (a, -1),
        (a, -a),
        (1, -a),
        (1, a),
        (a, a),
        (a, 1),
        (-a, 1),
        (-a, a),
        (-1, a),
        (-1, -a),
        (-a, -a),
    )


_CIRCLE = _polygon(36)
_CRESCENT = np.concatenate([_arc(0, 0, 0.95, 1, 50, 310, 20), _arc(0.42, 0, 0.72, 0.78, 285, 75, 14)])

#: Shape name -> closed loops.
SHAPES: dict[str, Loops] = {
    "circle": [_CIRCLE],
    "oval": [_CIRCLE * np.asarray([1.0, 0.55], np.float32)],
    "square": [_points((-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8))],
    "rectangle": [_points((-1, -0.48), (1, -0.48), (1, 0.48), (-1, 0.48))],
    "triangle": [_points((0, -0.95), (0.98, 0.8), (-0.98, 0.8))],
    "diamond": [_points((0, -1), (0.7, 0), (0, 1), (-0.7, 0))],
    "pentagon": [_polygon(5)],
    "hexagon": [_polygon(6, 0.0)],
    "star": [_star()],
    "heart": [_heart()],
    "cross": [_cross()],
    "ring": [_CIRCLE, _CIRCLE * np.float32(0.55)],
    "crescent": [_CRESCENT],
    "semicircle": [_arc(0, 0.5, 1, 1, 180, 360, 20)],
    "arrow": [_points((1, 0), (0.2, -0.8), (0.2, -0.3), (-1, -0.3), (-1, 0.3), (0.2, 0.3), (0.2, 0.8))],
    "teardrop": [np.concatenate([_arc(0, 0.38, 0.62, 0.62, -20, 200, 16), _points((0, -1))])],
    "trapezoid": [_points((-0.5, -0.6), (0.5, -0.6), (1, 0.6), (-1, 0.6))],
    "flower": [_flower()],
    "cloud": [_cloud()],
    "lightning": [_points((0.25, -1), (-0.55, 0.12), (-0.05, 0.12), (-0.3, 1), (0.55, -0.22), (0.05, -0.22))],
}


def _join(*parts: Array) -> Array:
    return np.concatenate(parts).astype(np.float32)


# Two or three ways to write a digit, because people do.
_GLYPH_VARIANTS: dict[str, tuple[tuple[Array, ...], ...]] = {
    "zero": ((_arc(0, 0, 0.62, 0.95, -90, 270, 20),), (_arc(0, 0, 0.5, 0.95, -70, 290, 20),)),
    "one": (
        (_points((-0.35, -0.55), (0.1, -0.95), (0.1, 0.95)),),
        (_points((0.05, -0.95), (0.0, 0.95)),),
        (_points((-0.4, -0.55), (0.05, -0.95), (0.05, 0.95)), _points((-0.4, 0.95), (0.5, 0.95))),
    ),
    "two": (
        (_join(_arc(0, -0.4, 0.6, 0.55, 190, 385, 12), _points((-0.62, 0.92), (0.66, 0.92))),),
        (_join(_arc(0, -0.42, 0.5, 0.5, 200, 400, 12), _points((-0.5, 0.8), (-0.2, 0.75), (0.7, 0.9))),),
    ),
    "three": (
        (_join(_arc(-0.05, -0.47, 0.55, 0.46, 205, 445, 12), _arc(-0.05, 0.45, 0.62, 0.5, -85, 155, 12)),),
        (
            _join(
                _points((-0.55, -0.92), (0.5, -0.92), (-0.05, -0.2)),
                _arc(-0.05, 0.4, 0.6, 0.55, -80, 150, 12),
            ),
        ),
    ),
    "four": (
        (_points((0.3, -0.95), (-0.65, 0.3), (0.7, 0.3)), _points((0.35, -0.3), (0.35, 0.95))),
        (_points((-0.5, -0.9), (-0.55, 0.1), (0.6, 0.1)), _points((0.5, -0.9), (0.42, 0.95))),
    ),
    "five": (
        (
            _join(
                _points((0.55, -0.92), (-0.45, -0.92), (-0.5, -0.12)),
                _arc(-0.05, 0.36, 0.6, 0.57, -120, 145, 14),
            ),
        ),
        (
            _join(_points((-0.4, -0.85), (-0.45, -0.15)), _arc(-0.05, 0.38, 0.55, 0.55, -110, 140, 12)),
            _points((-0.4, -0.88), (0.55, -0.9)),
        ),
    ),
    "six": (
        (_join(_points((0.35, -0.95), (-0.3, -0.3)), _arc(0, 0.4, 0.55, 0.53, 190, 550, 18)),),
        (_join(_arc(0.25, 0.1, 0.8, 1.05, 265, 180, 8), _arc(0, 0.42, 0.52, 0.5, 180, 530, 16)),),
    ),
    "seven": (
        (_points((-0.6, -0.92), (0.6, -0.92), (-0.15, 0.95)),),
        (_points((-0.55, -0.9), (0.6, -0.9), (-0.05, 0.95)), _points((-0.3, 0.05), (0.55, 0.0))),
    ),
    "eight": (
        (_arc(0, -0.46, 0.46, 0.46, 90, 450, 16), _arc(0, 0.47, 0.57, 0.48, -90, 270, 16)),
        (_arc(0.05, -0.5, 0.4, 0.42, 100, 460, 14), _arc(-0.03, 0.42, 0.48, 0.52, -80, 280, 14)),
    ),
    "nine": (
        (_arc(0, -0.4, 0.55, 0.53, 0, 360, 18), _points((0.55, -0.45), (0.5, 0.3), (0.2, 0.95))),
        (_join(_arc(-0.02, -0.42, 0.5, 0.5, 0, 350, 16), _points((0.48, -0.5), (0.42, 0.95))),),
    ),
}

#: Names of the ten digit glyphs.
GLYPHS: tuple[str, ...] = tuple(_GLYPH_VARIANTS)


def glyph_strokes(name: str, rng: np.random.Generator) -> tuple[list[Array], float]:
    """Write a digit as a hand would: a variant, slant, proportions, shaky points and a pen.

    Args:
        name: One of :data:`GLYPHS`.
        rng: Source of the handwriting.

    Returns:
        Strokes of shape (points, 2) and the pen's half width, both in units of the glyph's radius.
    """
    variants = _GLYPH_VARIANTS[name]
    strokes = variants[int(rng.integers(len(variants)))]
    slant = rng.uniform(-0.05, 0.35)
    wide = rng.uniform(0.7, 1.0)
    bend = rng.normal(0, 0.05, (3, 2))

    out = []
    for stroke in strokes:
        x = stroke[:, 0] * wide
        y = stroke[:, 1]
        # A slow sine wobble moves neighbouring points together, so curves stay curves.
        wobble = sum(np.outer(np.sin((k + 1) * 1.7 * y + k), bend[k]) for k in range(3))
        out.append((np.stack([x - slant * y, y * 0.92], 1) * 0.9 + wobble).astype(np.float32))

    return out, float(rng.uniform(0.09, 0.19))


def loops_distance(points: Array, loops: Loops) -> Array:
    """Signed distance of points to the border of filled loops, negative inside.

    Args:
        points: (P, 2) positions.
        loops: Closed loops of vertices, filled by the even-odd rule.

    Returns:
        (P,) distances in the units of the coordinates.
    """
    start = np.concatenate(list(loops))
    end = np.concatenate([np.roll(loop, -1, 0) for loop in loops])
    squared = _segments_squared(points, start, end)
    x = points[:, 0:1]
    y = points[:, 1:2]
    spans = (start[:, 1] > y) != (end[:, 1] > y)
    rise = end[:, 1] - start[:, 1]
    slope = (end[:, 0] - start[:, 0]) / np.where(np.abs(rise) < 1e-9, np.float32(1e-9), rise)
    crossings = spans & (x < start[:, 0] + (y - start[:, 1]) * slope)
    inside = np.count_nonzero(crossings, axis=1) % 2 == 1
    distance = np.sqrt(squared)

    return np.where(inside, -distance, distance)


def strokes_distance(points: Array, strokes: Sequence[Array], half_width: float) -> Array:
    """Signed distance of points to a pen line of round ends, negative inside.

    Args:
        points: (P, 2) positions.
        strokes: Open polylines.
        half_width: Half the pen's width, in the units of the coordinates.

    Returns:
        (P,) distances.
    """
    start = np.concatenate([s[:-1] for s in strokes])
    end = np.concatenate([s[1:] for s in strokes])
    return np.sqrt(_segments_squared(points, start, end)) - np.float32(half_width)


def _segments_squared(points: Array, start: Array, end: Array) -> Array:
    """Smallest squared distance of (P, 2) points to S segments."""
    along = end - start
    length = np.maximum((along**2).sum(1), np.float32(1e-9))
    dx = points[:, 0:1] - start[:, 0]
    dy = points[:, 1:2] - start[:, 1]
    t = np.clip((dx * along[:, 0] + dy * along[:, 1]) / length, 0, 1)
    return ((dx - t * along[:, 0]) ** 2 + (dy - t * along[:, 1]) ** 2).min(1)
