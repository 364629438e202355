"""From a spec to pixels, masks and boxes: anti-aliased painting with signed distances, then a style."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlprompt.data.scenes.attributes import COLOURS, TONES
from vlprompt.data.scenes.shapes import GLYPHS, SHAPES, glyph_strokes, loops_distance, strokes_distance
from vlprompt.data.scenes.spec import SceneObject, SceneSpec
from vlprompt.data.scenes.styles import apply_style

__all__ = ["Rendered", "render"]

Array = NDArray[Any]


@dataclass(frozen=True)
class Rendered:
    """An image and where its objects are.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        masks: (objects, H, W) bool, the visible pixels of each object; later objects hide earlier ones.
        boxes: (objects, 4) float32, x0 y0 x1 y1 in pixels around each mask, zeros when nothing is visible.
    """

    image: NDArray[np.uint8]
    masks: NDArray[np.bool_]
    boxes: Array


def render(spec: SceneSpec, size: int = 64) -> Rendered:
    """Paint a scene.

    Args:
        spec: What to paint.
        size: Side in pixels.

    Returns:
        The image, masks and boxes; a pure function of the arguments.
    """
    rng = np.random.Generator(np.random.PCG64(spec.seed))
    canvas = _ground(spec, size, rng)
    masks = np.zeros((len(spec.objects), size, size), bool)

    for index, item in enumerate(spec.objects):
        rows, columns, cover, paint = _object(item, size, rng)
        patch = canvas[rows, columns]
        patch += cover[..., None] * (paint - patch)
        # Later objects cover earlier ones: masks hold visible pixels only.
        masks[:index, rows, columns] &= ~(cover >= 0.5)
        masks[index, rows, columns] = cover >= 0.5

    image = apply_style(canvas, spec.style, rng)
    return Rendered(image, masks, _boxes(masks))


def _grid(size: int) -> tuple[Array, Array]:
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    return axis[None, :], axis[:, None]


def _ground(spec: SceneSpec, size: int, rng: np.random.Generator) -> Array:
    """Paint the ground, (H, W, 3): its texture is fainter than any object's colour."""
    tone = np.asarray(TONES[spec.tone], np.float32) + rng.normal(0, 0.02, 3).astype(np.float32)
    other = tone + np.float32(0.16 if spec.is_dark else -0.16)
    x, y = _grid(size)
    phase = rng.uniform(0, 1, 2)
    pitch = rng.uniform(6, 9)

    if spec.background == "plain":
        weight = np.zeros((size, size), np.float32)
    elif spec.background == "gradient":
        turn = rng.uniform(0, 2 * np.pi)
        ramp = np.cos(turn) * (x - 0.5) + np.sin(turn) * (y - 0.5)
        weight = np.float32(1.5) * (ramp + 0.5)
    elif spec.background == "grainy":
        weight = np.repeat(np.repeat(rng.random((32, 32), np.float32), -(-size // 32), 0), -(-size // 32), 1)
        weight = weight[:size, :size] * np.float32(1.2)
    elif spec.background == "grid":
        lines = [np.abs((axis * pitch + p) % 1 - 0.5) for axis, p in zip((x, y), phase, strict=True)]
        weight = _edge(np.minimum(*lines) - 0.09, pitch / size)
    elif spec.background == "diagonal":
        side = 1.0 if phase[0] < 0.5 else -1.0
        weight = _edge(np.abs(((x + side * y) * pitch * 0.8 + phase[1]) % 1 - 0.5) - 0.2, pitch / size)
    else:
        u = (x * pitch + phase[0]) % 1 - 0.5
        v = (y * pitch + phase[1]) % 1 - 0.5
        weight = _edge(np.sqrt(u**2 + v**2) - 0.28, pitch / size)

    return np.ascontiguousarray(
        tone + np.broadcast_to(weight, (size, size))[..., None] * (other - tone), np.float32
    )


def _object(item: SceneObject, size: int, rng: np.random.Generator) -> tuple[slice, slice, Array, Array]:
    """Return the object's rows and columns, its coverage (h, w) in [0, 1] and its paint (h, w, 3)."""
    radius = item.radius * size
    reach = radius * 1.12 + 1.5
    rows = _window(item.y * size, reach, size)
    columns = _window(item.x * size, reach, size)
    px = (np.arange(columns.start, columns.stop, dtype=np.float32) + 0.5 - item.x * size) / np.float32(radius)
    py = (np.arange(rows.start, rows.stop, dtype=np.float32) + 0.5 - item.y * size) / np.float32(radius)
    turn = np.radians(item.angle)
    cos = np.float32(np.cos(turn))
    sin = np.float32(np.sin(turn))
    u = cos * px[None, :] + sin * py[:, None]
    v = -sin * px[None, :] + cos * py[:, None]
    points = np.stack([u.ravel(), v.ravel()], 1)

    if item.shape in GLYPHS:
        strokes, pen = glyph_strokes(item.shape, rng)
        distance = strokes_distance(points, strokes, pen)
    else:
        distance = loops_distance(points, SHAPES[item.shape])

    distance = distance.reshape(u.shape)
    cover = _edge(distance, 1 / radius)
    if item.pattern == "outlined":
        # A line of at least 1.2 pixels, or small outlines would fade away.
        width = 0.07 if item.shape in GLYPHS else max(0.16, 2.4 / radius)
        cover = _edge(np.abs(distance + (0 if item.shape in GLYPHS else width / 2)) - width / 2, 1 / radius)

    return rows, columns, cover, _paint(item, u, v, rng, 1 / radius)


def _paint(item: SceneObject, u: Array, v: Array, rng: np.random.Generator, pixel: float) -> Array:
    """Colour of an object's surface, (h, w, 3): the named colour and a lighter or darker kin of it."""
    base = np.clip(np.asarray(COLOURS[item.colour], np.float32) + rng.normal(0, 0.03, 3), 0, 1).astype(
        np.float32
    )
    bright = float(base @ np.asarray([0.3, 0.59, 0.11], np.float32))
    kin = base * np.float32(0.35) if bright > 0.45 else base + (1 - base) * np.float32(0.62)
    phase = rng.uniform(0, 1, 2)
    turn = rng.uniform(0, np.pi)

    if item.pattern in ("solid", "outlined"):
        weight = np.zeros_like(u)
    elif item.pattern == "striped":
        weight = _edge(np.abs((u * np.cos(turn) + v * np.sin(turn)) * 1.7 % 1 - 0.5) - 0.25, 1.7 * pixel)
    elif item.pattern == "dotted":
        a = (u * 2 + phase[0]) % 1 - 0.5
        b = (v * 2 + phase[1]) % 1 - 0.5
        weight = _edge(np.sqrt(a**2 + b**2) - 0.27, 2 * pixel)
    elif item.pattern == "checkered":
        a = np.abs((u * 1.1 + phase[0]) % 1 - 0.5) - 0.25
        b = np.abs((v * 1.1 + phase[1]) % 1 - 0.5) - 0.25
        p = _edge(a, 1.1 * pixel)
        q = _edge(b, 1.1 * pixel)
        weight = p + q - 2 * p * q
    elif item.pattern == "gradient":
        weight = np.clip((u * np.cos(turn) + v * np.sin(turn)) * 0.55 + 0.5, 0, 1)
    else:
        weight = _edge(u * np.cos(turn) + v * np.sin(turn), pixel)

    return base + weight[..., None].astype(np.float32) * (kin - base)


def _edge(distance: Array, pixel: float) -> Array:
    """Coverage of a pixel whose centre lies at a signed distance: a linear ramp one pixel wide."""
    return np.clip(0.5 - distance / np.float32(pixel), 0, 1).astype(np.float32)


def _window(centre: float, reach: float, size: int) -> slice:
    start = int(np.clip(np.floor(centre - reach), 0, size))
    return slice(start, max(start, int(np.clip(np.ceil(centre + reach), 0, size))))


def _boxes(masks: NDArray[np.bool_]) -> Array:
    boxes = np.zeros((len(masks), 4), np.float32)
    for box, mask in zip(boxes, masks, strict=True):
        rows = np.flatnonzero(mask.any(1))
        columns = np.flatnonzero(mask.any(0))
        if len(rows):
            box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return boxes
