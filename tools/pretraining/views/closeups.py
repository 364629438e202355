"""Retinas, skins, cells, cracked surfaces and rooms: what cameras see from near."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from pretraining.views.canvas import Canvas, mixed
from pretraining.views.things import person

__all__ = ["cells", "cracks", "retina", "room", "skin"]

Segment = tuple[float, float, float, float, float]


def retina(canvas: Canvas) -> None:
    """Paint the back of an eye: a disc of light, the optic disc, and vessels that branch away from it."""
    rng = canvas.rng
    canvas.pixels[:] = mixed(rng, (0, 0, 0), (0.05, 0.03, 0.03))
    eye = canvas.ellipse(0.5, 0.5, *(float(rng.uniform(0.85, 1.3)) * np.ones(2)))
    base = mixed(rng, (0.45, 0.18, 0.08), (0.85, 0.5, 0.3))
    if rng.random() < 0.15:
        base = np.full(3, base.mean(), np.float32)  # photographed in grey

    canvas.paint(["retina"], eye, canvas.textured(base, 0.06, 2))
    rows, columns = np.ogrid[0 : canvas.side, 0 : canvas.side]
    away = ((rows / canvas.side - 0.5) ** 2 + (columns / canvas.side - 0.5) ** 2).astype(np.float32)
    canvas.pixels *= 1 - float(rng.uniform(0.3, 1.0)) * away[..., None]

    x, y = float(rng.uniform(0.12, 0.88)), float(rng.uniform(0.4, 0.6))
    size = float(rng.uniform(0.1, 0.18))
    disc = canvas.ellipse(x, y, size, size * 1.1) & eye
    bright = np.clip(base * rng.uniform(1.3, 1.9) + 0.15, 0, 1)
    canvas.paint(["optic disc"], disc, canvas.textured(bright, 0.05, 2), ["retina"])

    dark = base * rng.uniform(0.45, 0.8) * np.array([1.0, rng.uniform(0.6, 0.9), rng.uniform(0.6, 0.9)])
    vessels = _drawn(canvas, _branches(rng, x, y)) & eye
    alpha = float(rng.uniform(0.5, 0.95))
    texture = alpha * np.asarray(dark, np.float32) + (1 - alpha) * canvas.pixels
    canvas.paint(["vessel"], vessels, texture, ["retina"])

    for _ in range(int(rng.integers(0, 6)) if rng.random() < 0.4 else 0):
        spot = canvas.blob(*rng.uniform(0.2, 0.8, 2), *rng.uniform(0.01, 0.06, 2)) & eye
        colour = mixed(rng, (0.85, 0.75, 0.4), (0.35, 0.05, 0.03))
        canvas.paint(["lesion"], spot, colour, ["retina"])


def _branches(rng: np.random.Generator, x: float, y: float) -> list[Segment]:
    """Return line pieces (x0, y0, x1, y1, width) of vessels, from (x, y) outwards."""
    segments: list[Segment] = []
    inwards = 0.0 if x < 0.5 else np.pi
    starts = [inwards + sign * rng.uniform(0.5, 1.5) for sign in (-1, -1, 1, 1)]
    starts += list(rng.uniform(0, 2 * np.pi, int(rng.integers(1, 5))))
    widest = float(rng.uniform(0.008, 0.022))
    stems = [(x, y, float(angle), widest * float(rng.uniform(0.6, 1))) for angle in starts]

    while stems and len(segments) < 1500:
        px, py, angle, width = stems.pop()
        goal = inwards if rng.random() < 0.7 else angle
        turn = 0.0
        for _ in range(int(rng.integers(10, 50))):
            turn = 0.85 * turn + rng.normal(0, 0.06)
            angle += turn + 0.015 * np.sin(goal - angle)
            qx, qy = px + 0.016 * np.cos(angle), py + 0.016 * np.sin(angle)
            segments.append((px, py, qx, qy, width))
            px, py = qx, qy
            width *= 0.99
            if width > 0.0025 and rng.random() < 0.07:
                side = rng.choice([-1, 1]) * rng.uniform(0.4, 1.1)
                stems.append((px, py, angle + side, width * float(rng.uniform(0.4, 0.75))))
            if not (-0.05 < px < 1.05 and -0.05 < py < 1.05):
                break
        else:
            if width > 0.0025:
                stems.append((px, py, angle - 0.35, width * 0.75))
                stems.append((px, py, angle + 0.35, width * 0.7))

    return segments


def _drawn(canvas: Canvas, segments: list[Segment]) -> NDArray[np.bool_]:
    """Return the inside of lines; the thinnest are as wide as a pixel."""
    scale = 2 * canvas.side
    image = Image.new("L", (scale, scale))
    draw = ImageDraw.Draw(image)
    for x0, y0, x1, y1, width in segments:
        draw.line(
            (x0 * scale, y0 * scale, x1 * scale, y1 * scale), fill=255, width=max(2, round(width * scale))
        )
    return np.asarray(image.resize((canvas.side, canvas.side), Image.Resampling.BOX)) > 110


def skin(canvas: Canvas) -> None:
    """Paint skin or the lining of a gut, and what grows on it."""
    rng = canvas.rng
    inside = rng.random() < 0.5
    everywhere = np.ones((canvas.side, canvas.side), bool)
    base = (
        mixed(rng, (0.6, 0.25, 0.2), (0.85, 0.5, 0.42))
        if inside
        else mixed(rng, (0.35, 0.22, 0.16), (0.93, 0.76, 0.67))
    )
    canvas.paint([] if inside else ["skin"], everywhere, canvas.textured(base, 0.06, 1))
    if inside:
        rows, columns = np.mgrid[0 : canvas.side, 0 : canvas.side] / canvas.side
        depth = 0.35 + 1.3 * np.hypot(rows - rng.uniform(0.2, 0.8), columns - rng.uniform(0.2, 0.8))
        canvas.pixels *= np.clip(depth, 0, 1.2)[..., None].astype(np.float32)

    x, y = rng.uniform(0.25, 0.75, 2)
    width = float(rng.uniform(0.12, 0.6))
    mask = canvas.blob(x, y, width, width * float(rng.uniform(0.6, 1.2)), 0.2)
    if inside:
        canvas.paint(["polyp"], mask, canvas.textured(base * rng.uniform(0.85, 1.2), 0.05, 1, light=0.4))
    else:
        colour = mixed(rng, (0.12, 0.07, 0.05), (0.5, 0.28, 0.2))
        canvas.paint(["lesion", "mole"], mask, canvas.textured(colour, 0.2, 1), ["skin"])
    for _ in range(int(rng.integers(0, 8))):
        shine = canvas.ellipse(*rng.uniform(0, 1, 2), *rng.uniform(0.005, 0.03, 2))
        canvas.pixels[shine] = 0.95


def cells(canvas: Canvas) -> None:
    """Paint cells with their nuclei under a microscope, stained or shining."""
    rng = canvas.rng
    is_dark = rng.random() < 0.4
    back = (
        mixed(rng, (0.02, 0.02, 0.05), (0.1, 0.1, 0.12))
        if is_dark
        else mixed(rng, (0.85, 0.75, 0.85), (0.97, 0.93, 0.95))
    )
    canvas.paint([], np.ones((canvas.side, canvas.side), bool), canvas.textured(back, 0.04, 1))
    cell = (
        mixed(rng, (0.1, 0.3, 0.15), (0.2, 0.2, 0.5))
        if is_dark
        else mixed(rng, (0.8, 0.55, 0.7), (0.85, 0.7, 0.85))
    )
    nucleus = (
        mixed(rng, (0.2, 0.4, 0.9), (0.6, 0.9, 0.6))
        if is_dark
        else mixed(rng, (0.3, 0.15, 0.45), (0.5, 0.3, 0.6))
    )
    size = float(rng.uniform(0.06, 0.2))

    for _ in range(int(rng.integers(5, 30))):
        x, y = rng.uniform(0, 1, 2)
        wide, high = size * rng.uniform(0.7, 1.3, 2)
        canvas.paint(["cell"], canvas.blob(x, y, wide, high, 0.1), canvas.textured(cell, 0.1, 1))
        canvas.paint(
            ["nucleus"],
            canvas.blob(x, y, wide * 0.5, high * 0.5, 0.1),
            canvas.textured(nucleus, 0.15, 1),
            ["cell"],
        )


def cracks(canvas: Canvas) -> None:
    """Paint a wall or a pavement with a crack in it."""
    rng = canvas.rng
    everywhere = np.ones((canvas.side, canvas.side), bool)
    name = ["wall", "road", "pavement"][int(rng.integers(3))]
    base = mixed(rng, (0.4, 0.4, 0.4), (0.75, 0.73, 0.7))
    canvas.paint([name], everywhere, canvas.textured(base, float(rng.uniform(0.04, 0.15)), 0))

    segments: list[Segment] = []
    for _ in range(int(rng.integers(1, 4))):
        x, y, angle = float(rng.random()), float(rng.random()), float(rng.uniform(0, 6.3))
        width = float(rng.uniform(0.003, 0.015))
        for _ in range(int(rng.integers(20, 80))):
            angle += rng.normal(0, 0.35)
            nx, ny = x + 0.015 * np.cos(angle), y + 0.015 * np.sin(angle)
            segments.append((x, y, nx, ny, width * float(rng.uniform(0.5, 1.2))))
            x, y = nx, ny

    canvas.paint(["crack"], _drawn(canvas, segments), base * rng.uniform(0.2, 0.55), [name])


def room(canvas: Canvas) -> None:
    """Paint a room: walls, floor, a window or a door, pictures, a table, people."""
    rng = canvas.rng
    floor = float(rng.uniform(0.55, 0.9))
    everywhere = np.ones((canvas.side, canvas.side), bool)
    canvas.paint(
        ["wall"], everywhere, canvas.textured(mixed(rng, (0.4, 0.4, 0.45), (0.95, 0.92, 0.85)), 0.02, 1)
    )
    slope = float(rng.uniform(-0.2, 0.2))
    boards = canvas.textured(mixed(rng, (0.3, 0.18, 0.1), (0.75, 0.65, 0.55)), 0.12, 0, 6)
    canvas.paint(["floor"], canvas.polygon([(0, floor), (1, floor + slope), (1, 1.3), (0, 1.3)]), boards)
    if rng.random() < 0.4:
        high = float(rng.uniform(0.03, 0.2))
        canvas.paint(
            ["ceiling"],
            canvas.polygon([(0, 0), (1, 0), (1, high), (0, high * 1.3)]),
            mixed(rng, (0.8, 0.8, 0.8), (1, 1, 1)),
        )

    if rng.random() < 0.6:
        x, y = rng.uniform(0, 0.7), rng.uniform(0.05, 0.25)
        wide, high = rng.uniform(0.15, 0.35, 2)
        canvas.paint(
            [],
            canvas.box(x - 0.02, y - 0.02, x + wide + 0.02, y + high + 0.02),
            mixed(rng, (0.3, 0.2, 0.15), (1, 1, 1)),
        )
        light = canvas.textured(mixed(rng, (0.6, 0.75, 0.9), (1, 1, 1)), 0.1, 2)
        canvas.paint(["window"], canvas.box(x, y, x + wide, y + high), light)
    if rng.random() < 0.4:
        x = rng.uniform(0, 0.8)
        canvas.paint(
            ["door"],
            canvas.box(x, floor - 0.5, x + 0.2, floor + 0.02),
            canvas.textured(mixed(rng, (0.35, 0.22, 0.12), (0.9, 0.9, 0.88)), 0.06, 0),
        )
    if rng.random() < 0.6:
        _table(canvas, floor)
    if rng.random() < 0.5:
        person(
            canvas, float(rng.uniform(0.1, 0.9)), float(rng.uniform(floor, 1.3)), float(rng.uniform(0.5, 1.0))
        )


def _table(canvas: Canvas, floor: float) -> None:
    rng = canvas.rng
    x, wide = rng.uniform(0, 0.6), rng.uniform(0.25, 0.6)
    top = floor - rng.uniform(-0.05, 0.15)
    colour = mixed(rng, (0.3, 0.18, 0.08), (0.8, 0.7, 0.6))
    for leg in (x + 0.03, x + wide - 0.05):
        canvas.paint(["table"], canvas.box(leg, top, leg + 0.025, top + 0.35), colour * 0.8)
    plate = canvas.polygon(
        [(x, top + 0.05), (x + 0.08, top - 0.03), (x + wide - 0.08, top - 0.03), (x + wide, top + 0.05)]
    )
    canvas.paint(["table"], plate, canvas.textured(colour, 0.1, 0, 5))
