"""Skies, grounds, buildings, trees, and the streets, coasts and fields they make up."""

from __future__ import annotations

import numpy as np

from pretraining.views.canvas import Canvas, Colour, mixed, noise
from pretraining.views.things import boat, person, pole, tree, vehicle

__all__ = ["coast", "field", "house_front", "street"]

_SKIES: tuple[tuple[Colour, Colour], ...] = (
    ((0.25, 0.45, 0.8), (0.75, 0.85, 0.95)),
    ((0.9, 0.92, 0.95), (0.98, 0.98, 0.98)),
    ((0.6, 0.65, 0.7), (0.8, 0.82, 0.85)),
    ((0.4, 0.4, 0.6), (0.95, 0.7, 0.45)),
)
_WALLS: tuple[tuple[Colour, Colour], ...] = (
    ((0.55, 0.3, 0.22), (0.7, 0.45, 0.35)),
    ((0.75, 0.7, 0.6), (0.9, 0.87, 0.8)),
    ((0.35, 0.35, 0.37), (0.65, 0.65, 0.67)),
    ((0.3, 0.25, 0.2), (0.5, 0.42, 0.35)),
)
#: Names of grounds, two colours, grain, and how much longer than high the grain is.
_GROUNDS: tuple[tuple[tuple[str, ...], Colour, Colour, float, float], ...] = (
    (("grass",), (0.2, 0.38, 0.1), (0.5, 0.6, 0.25), 0.15, 2.0),
    (("sand",), (0.75, 0.65, 0.45), (0.9, 0.82, 0.65), 0.06, 3.0),
    (("snow",), (0.85, 0.87, 0.92), (0.98, 0.98, 1.0), 0.03, 2.0),
    (("soil",), (0.35, 0.25, 0.15), (0.55, 0.42, 0.3), 0.15, 2.0),
)


def sky(canvas: Canvas, horizon: float) -> None:
    """Paint the sky over everything, with or without clouds."""
    rng = canvas.rng
    top, bottom = _SKIES[int(rng.choice(len(_SKIES), p=[0.4, 0.25, 0.25, 0.1]))]
    down = np.clip(np.linspace(0, 1 / max(horizon, 0.1), canvas.side), 0, 1)[:, None, None]
    colour = (1 - down) * mixed(rng, top, top) + down * mixed(rng, bottom, bottom)
    texture = np.broadcast_to(colour, canvas.pixels.shape) + 0.01 * noise(rng, canvas.side, 2)[..., None]
    everywhere = np.ones((canvas.side, canvas.side), bool)
    canvas.paint(["sky"], everywhere, texture.astype(np.float32))

    if rng.random() < 0.5:
        clouds = noise(rng, canvas.side, 2, 1.5) + 0.3 * noise(rng, canvas.side, 1)
        alpha = np.clip((clouds - rng.uniform(0.2, 1.0)) * 2, 0, 1)[..., None]
        white = rng.uniform(0.75, 1.0) * (1 + 0.05 * noise(rng, canvas.side, 2))[..., None]
        canvas.pixels = canvas.pixels * (1 - alpha) + white * alpha
        canvas.masks["cloud"] = alpha[..., 0] > 0.4


def ridge(canvas: Canvas, base: float, height: float) -> np.ndarray:
    """Return what lies below a rough line, in units of the side."""
    rng = canvas.rng
    line = noise(rng, canvas.side, 2)[0] * height / 2 + noise(rng, canvas.side, 1)[0] * height / 10
    rows = np.linspace(0, 1, canvas.side)[:, None]
    return rows > base - np.abs(line)[None]


def ground(canvas: Canvas, horizon: float) -> None:
    """Paint one of the grounds from the horizon down."""
    rng = canvas.rng
    names, first, second, grain, stretch = _GROUNDS[int(rng.choice(len(_GROUNDS), p=[0.55, 0.15, 0.1, 0.2]))]
    below = ridge(canvas, horizon, 0.02)
    canvas.paint(names, below, canvas.textured(mixed(rng, first, second), grain, 0, stretch))


def mountains(canvas: Canvas, horizon: float) -> None:
    """Paint one or two chains of mountains, or a forest far away."""
    rng = canvas.rng
    for _ in range(int(rng.integers(1, 3))):
        mask = ridge(canvas, horizon, float(rng.uniform(0.1, 0.35)))
        if rng.random() < 0.3:
            canvas.paint(
                ["tree", "forest"],
                mask,
                canvas.textured(mixed(rng, (0.1, 0.2, 0.08), (0.3, 0.4, 0.2)), 0.25, 0),
            )
        else:
            colour = mixed(rng, (0.3, 0.33, 0.3), (0.6, 0.6, 0.65))
            canvas.paint(["mountain"], mask, canvas.textured(colour, 0.15, 1))


def building(
    canvas: Canvas, left: float, top: float, right: float, bottom: float, slope: float = 0.0
) -> None:
    """Paint a building with rows of windows, perhaps a door and a roof.

    Args:
        canvas: Where.
        left: All four in units of the side.
        top: Of its left edge.
        right: See above.
        bottom: See above.
        slope: How much lower the top is at the right edge, as the roofs of a street are.
    """
    rng = canvas.rng
    first, second = _WALLS[int(rng.integers(len(_WALLS)))]
    names = ["building"]
    width, height = right - left, bottom - top
    is_house = abs(slope) < 0.01 and width < 0.6 and rng.random() < 0.3

    if is_house:
        names = ["building", "house"]
        peak = left + width * rng.uniform(0.3, 0.7)
        roof = canvas.polygon([(left - 0.02, top), (peak, top - height * 0.35), (right + 0.02, top)])
        tiles = canvas.textured(mixed(rng, (0.45, 0.2, 0.15), (0.35, 0.35, 0.38)), 0.1, 0, 3)
        canvas.paint([*names, "roof"], roof, tiles)

    wall = canvas.polygon([(left, top), (right, top + slope), (right, bottom), (left, bottom)])
    canvas.paint(
        [*names, "wall"], wall, canvas.textured(mixed(rng, first, second), float(rng.uniform(0.02, 0.12)), 0)
    )
    _windows(canvas, (left, top, right, bottom), slope, names)

    if rng.random() < 0.4:
        x = rng.uniform(left, right)
        door = canvas.box(x, bottom - min(0.12, height * 0.3), x + min(0.06, width * 0.3), bottom) & wall
        canvas.paint(["door"], door, mixed(rng, (0.1, 0.1, 0.15), (0.6, 0.3, 0.15)), names)


def _windows(canvas: Canvas, box: tuple[float, float, float, float], slope: float, names: list[str]) -> None:
    rng = canvas.rng
    left, top, right, bottom = box
    columns = int(rng.integers(1, 8))
    rows = int(rng.integers(1, 7))
    glass = mixed(rng, (0.08, 0.1, 0.14), (0.6, 0.68, 0.78))
    share = rng.uniform(0.35, 0.75)
    mask = np.zeros((canvas.side, canvas.side), bool)

    for column in range(columns):
        x = left + (column + 0.5) / columns * (right - left)
        upper = top + slope * (column + 0.5) / columns
        half = 0.5 * share * (right - left) / columns
        for row in range(rows):
            y = upper + (row + 0.45) / rows * (bottom - upper)
            tall = 0.5 * share * (bottom - upper) / rows
            mask |= canvas.box(x - half, y - tall, x + half, y + tall)

    texture = canvas.textured(glass, 0.1, 2)
    canvas.paint(["window"], mask, texture, [*names, "wall"])


def street(canvas: Canvas) -> None:
    """Paint a street towards a vanishing point, as from a car or a pavement."""
    rng = canvas.rng
    horizon = float(rng.uniform(0.35, 0.6))
    vanish = float(rng.uniform(0.25, 0.75))
    sky(canvas, horizon)
    if rng.random() < 0.3:
        mountains(canvas, horizon)
    ground(canvas, horizon)
    _row_of_buildings(canvas, horizon, vanish)

    for _ in range(int(rng.integers(0, 4))):
        x = float(rng.uniform(0, 1))
        near = 0.25 + 0.75 * abs(x - vanish)
        tree(canvas, x, horizon + 0.12 * near, float(rng.uniform(0.2, 0.7)) * near)

    _lanes(canvas, horizon, vanish)
    _traffic(canvas, horizon, vanish)


def _row_of_buildings(canvas: Canvas, horizon: float, vanish: float) -> None:
    """Paint buildings at both sides; the far ones first."""
    rng = canvas.rng
    if rng.random() < 0.6:
        for _ in range(int(rng.integers(1, 5))):
            x = float(rng.uniform(-0.1, 1))
            building(
                canvas,
                x,
                horizon - float(rng.uniform(0.05, 0.25)),
                x + float(rng.uniform(0.1, 0.3)),
                horizon + 0.02,
            )

    for direction in (-1, 1):
        if rng.random() < 0.2:
            continue
        edges = np.sort(rng.uniform(0.05, 1.0, int(rng.integers(1, 4))))
        tall = float(rng.uniform(0.2, 1.2))
        start = 0.05
        for edge in edges:
            near, far = vanish + direction * edge, vanish + direction * start
            high = horizon - tall * float(rng.uniform(0.7, 1.2)) * edge
            low = horizon - (horizon - high) * start / edge
            bottom = horizon + 0.08 * edge + 0.03
            if direction < 0:
                building(canvas, near, high, far, bottom, low - high)
            else:
                building(canvas, far, low, near, bottom, high - low)
            start = edge


def _lanes(canvas: Canvas, horizon: float, vanish: float) -> None:
    """Paint a road between pavements or verges."""
    rng = canvas.rng
    left, right = sorted(rng.uniform(-0.9, 1.9, 2))
    right = max(right, left + 0.7)
    wide = float(rng.uniform(0.1, 0.5))
    top = horizon + float(rng.uniform(0.0, 0.05))
    narrow = float(rng.uniform(0.01, 0.06))

    if rng.random() < 0.75:
        colour = mixed(rng, (0.45, 0.43, 0.42), (0.75, 0.72, 0.68))
        mask = canvas.polygon(
            [(vanish - 2 * narrow, top), (vanish + 2 * narrow, top), (right + wide, 1), (left - wide, 1)]
        )
        canvas.paint(["pavement"], mask, canvas.textured(colour, float(rng.uniform(0.02, 0.08)), 0, 2))

    colour = mixed(rng, (0.2, 0.2, 0.21), (0.6, 0.6, 0.6))
    mask = canvas.polygon([(vanish - narrow, top), (vanish + narrow, top), (right, 1), (left, 1)])
    canvas.paint(["road"], mask, canvas.textured(colour, float(rng.uniform(0.02, 0.08)), 0, 2))

    if rng.random() < 0.6:
        line = rng.uniform(left, right)
        for start in np.arange(0.05, 1, 0.2 if rng.random() < 0.7 else 0.15):
            edge = [(start, -1), (start, 1), (start + 0.12, 1), (start + 0.12, -1)]
            points = [
                (vanish + (line - vanish) * s + sign * 0.015 * s, top + (1 - top) * s) for s, sign in edge
            ]
            canvas.paint(
                ["road marking"],
                canvas.polygon(points),
                mixed(rng, (0.8, 0.8, 0.8), (0.95, 0.9, 0.7)),
                ["road"],
            )

    if rng.random() < 0.4:  # shadows of what stands beside it
        canvas.shade(mask & (noise(rng, canvas.side, 2, 2) > 0.5), float(rng.uniform(0.5, 0.8)))


def _traffic(canvas: Canvas, horizon: float, vanish: float) -> None:
    """Paint cars, people and poles, the far ones first."""
    rng = canvas.rng
    for depth in np.sort(rng.uniform(0.05, 0.9, int(rng.integers(1, 9)))):
        x = vanish + float(rng.uniform(-1.2, 1.2)) * depth
        foot = horizon + 0.03 + (1 - horizon) * depth * 0.8
        kind = rng.random()

        if kind < 0.55:
            vehicle(canvas, x, foot, float(rng.uniform(0.3, 0.6)) * depth + 0.03)
        elif kind < 0.8:
            person(canvas, x, foot, float(rng.uniform(0.35, 0.55)) * depth + 0.04)
        else:
            pole(canvas, x, foot, float(rng.uniform(0.6, 1.2)) * depth + 0.1)


def coast(canvas: Canvas) -> None:
    """Paint water below the sky, a shore, perhaps mountains and boats."""
    rng = canvas.rng
    horizon = float(rng.uniform(0.25, 0.6))
    sky(canvas, horizon)
    if rng.random() < 0.5:
        mountains(canvas, horizon)

    colour = mixed(rng, (0.1, 0.25, 0.35), (0.45, 0.6, 0.65))
    canvas.paint(["water"], canvas.box(0, horizon, 1, 1), canvas.textured(colour, 0.12, 1, 6))
    for _ in range(int(rng.integers(0, 3))):
        boat(
            canvas, float(rng.uniform(0, 1)), float(rng.uniform(horizon, 0.8)), float(rng.uniform(0.08, 0.4))
        )
    if rng.random() < 0.7:
        ground(canvas, float(rng.uniform(0.7, 0.95)))
    for _ in range(int(rng.integers(0, 3))):
        person(canvas, float(rng.uniform(0, 1)), float(rng.uniform(0.7, 1)), float(rng.uniform(0.1, 0.4)))


def field(canvas: Canvas) -> None:
    """Paint open land with trees, perhaps a path, a house and people."""
    rng = canvas.rng
    horizon = float(rng.uniform(0.2, 0.7))
    sky(canvas, horizon)
    if rng.random() < 0.6:
        mountains(canvas, horizon)
    ground(canvas, horizon)

    if rng.random() < 0.3:
        x = float(rng.uniform(0, 0.8))
        building(
            canvas, x, horizon - float(rng.uniform(0, 0.2)), x + float(rng.uniform(0.1, 0.3)), horizon + 0.08
        )
    if rng.random() < 0.4:
        _lanes(canvas, horizon, float(rng.uniform(0.2, 0.8)))
    for depth in np.sort(rng.uniform(0.1, 1, int(rng.integers(0, 5)))):
        tree(canvas, float(rng.uniform(0, 1)), horizon + 0.3 * depth, float(rng.uniform(0.4, 0.9)) * depth)
    for _ in range(int(rng.integers(0, 3))):
        person(
            canvas,
            float(rng.uniform(0, 1)),
            float(rng.uniform(horizon + 0.1, 1)),
            float(rng.uniform(0.1, 0.6)),
        )


def house_front(canvas: Canvas) -> None:
    """Paint one building from the front, with what stands before it."""
    rng = canvas.rng
    sky(canvas, 0.5)
    foot = float(rng.uniform(0.7, 0.95))
    ground(canvas, foot - 0.05)
    left = float(rng.uniform(-0.2, 0.3))
    building(canvas, left, float(rng.uniform(0.05, 0.5)), float(rng.uniform(0.6, 1.2)), foot)

    for _ in range(int(rng.integers(0, 4))):
        x = float(rng.uniform(0, 1))
        size = float(rng.uniform(0.2, 0.6))
        [tree, person, vehicle][int(rng.integers(3))](canvas, x, foot + 0.05, size)
