"""Trees, cars, people, poles and boats: rough outlines of what stands in a view."""

from __future__ import annotations

import numpy as np

from pretraining.views.canvas import Canvas, mixed, noise

__all__ = ["boat", "person", "pole", "tree", "vehicle"]


def tree(canvas: Canvas, x: float, foot: float, size: float) -> None:
    """Paint a tree or a bush; (x, foot) is where it stands, all in units of the side."""
    rng = canvas.rng
    width = size * float(rng.uniform(0.4, 1.0))
    is_bush = rng.random() < 0.2
    if not is_bush:
        thick = max(0.008, 0.06 * size)
        trunk = canvas.box(x - thick / 2, foot - 0.5 * size, x + thick / 2, foot)
        canvas.paint(
            ["tree", "trunk"], trunk, canvas.textured(mixed(rng, (0.2, 0.15, 0.1), (0.45, 0.38, 0.3)), 0.2, 0)
        )

    crown = np.zeros((canvas.side, canvas.side), bool)
    middle = foot - (0.15 if is_bush else 0.6) * size
    height = (0.4 if is_bush else 0.75) * size
    for _ in range(int(rng.integers(1, 5))):
        dx, dy = rng.normal(0, 0.15 * width), rng.normal(0, 0.12 * height)
        crown |= canvas.blob(
            x + dx, middle + dy, width * rng.uniform(0.6, 1), height * rng.uniform(0.6, 1), 0.5
        )

    if rng.random() < 0.25:  # twigs with sky between them
        crown &= noise(rng, canvas.side, 0) > -0.3
    colour = mixed(rng, (0.08, 0.18, 0.05), (0.45, 0.5, 0.2))
    if rng.random() < 0.25:
        colour = mixed(rng, (0.5, 0.25, 0.1), (0.3, 0.25, 0.2))
    names = ["bush"] if is_bush else ["tree"]
    canvas.paint(names, crown, canvas.textured(colour, 0.4, 0, light=0.4))


def vehicle(canvas: Canvas, x: float, foot: float, size: float) -> None:
    """Paint a car, seldom a bus or a truck, from the side or the end."""
    rng = canvas.rng
    kind = ["car", "bus", "truck"][int(rng.choice(3, p=[0.8, 0.1, 0.1]))]
    from_side = rng.random() < 0.4
    width = size if from_side else 0.7 * size
    height = {"car": 0.42, "bus": 0.75, "truck": 0.7}[kind] * size * (1 if from_side else 1.3)
    left, right, top = x - width / 2, x + width / 2, foot - height
    names = [kind, "vehicle"]
    canvas.shade(canvas.ellipse(x, foot, 1.1 * width, 0.12 * size), 0.45)

    paint = mixed(rng, (0.05, 0.05, 0.06), (0.85, 0.85, 0.87))
    if rng.random() < 0.5:
        paint = mixed(rng, rng.uniform(0, 0.9, 3), rng.uniform(0, 0.9, 3))
    body = canvas.textured(paint, 0.06, 2, light=0.4)
    belt = top + 0.45 * height
    slant = (0.18 if kind == "car" else 0.02) * width
    cabin = canvas.polygon(
        [
            (left + slant, top),
            (right - slant * 0.8, top),
            (right - 0.04 * width, belt),
            (left + 0.04 * width, belt),
        ]
    )
    lower = canvas.box(left, belt, right, foot - 0.06 * height)

    canvas.paint(names, cabin | lower, body)
    inner = canvas.polygon(
        [(left + slant + 0.06 * width, top + 0.06 * height), (right - slant - 0.04 * width, top + 0.06 * height),
         (right - 0.12 * width, belt), (left + 0.12 * width, belt)]
    )  # fmt: skip
    canvas.paint([], inner, canvas.textured(mixed(rng, (0.05, 0.06, 0.08), (0.5, 0.55, 0.6)), 0.2, 2), names)

    wheel = 0.16 * size if from_side else 0.1 * size
    for side in (0.22, 0.8) if from_side else (0.12, 0.88):
        tyre = canvas.ellipse(left + side * width, foot - wheel / 2, wheel, wheel * 1.1)
        canvas.paint([*names, "wheel"], tyre, mixed(rng, (0.03, 0.03, 0.03), (0.2, 0.2, 0.2)), names)
    if not from_side:
        for side in (0.12, 0.88):
            light = canvas.ellipse(left + side * width, belt + 0.15 * height, 0.1 * width, 0.08 * height)
            canvas.paint([], light, mixed(rng, (0.6, 0.1, 0.08), (0.95, 0.9, 0.8)), names)


def person(canvas: Canvas, x: float, foot: float, size: float) -> None:
    """Paint somebody who stands or walks."""
    rng = canvas.rng
    wide = 0.26 * size
    stride = float(rng.uniform(0.02, 0.12)) * size
    hip, neck = foot - 0.48 * size, foot - 0.84 * size

    legs = canvas.polygon(
        [
            (x - wide / 3, hip),
            (x + wide / 3, hip),
            (x + stride, foot),
            (x, hip + 0.1 * size),
            (x - stride, foot),
        ]
    )
    canvas.paint(["person"], legs, canvas.textured(mixed(rng, (0.05, 0.05, 0.1), (0.4, 0.38, 0.35)), 0.1, 1))
    torso = canvas.polygon(
        [
            (x - wide / 2, neck + 0.03 * size),
            (x + wide / 2, neck + 0.03 * size),
            (x + wide / 2.6, hip + 0.05 * size),
            (x - wide / 2.6, hip + 0.05 * size),
        ]
    )
    canvas.paint(["person"], torso, canvas.textured(rng.uniform(0.05, 0.95, 3), 0.1, 1))
    head = canvas.ellipse(x, neck - 0.06 * size, 0.13 * size, 0.17 * size)
    canvas.paint(["person"], head, canvas.textured(mixed(rng, (0.3, 0.2, 0.15), (0.9, 0.72, 0.6)), 0.05, 1))
    hair = canvas.ellipse(x, neck - 0.11 * size, 0.13 * size, 0.09 * size)
    canvas.paint(["person"], hair, mixed(rng, (0.05, 0.04, 0.03), (0.5, 0.4, 0.25)))


def pole(canvas: Canvas, x: float, foot: float, size: float) -> None:
    """Paint a lamp post, a traffic light or a sign."""
    rng = canvas.rng
    thick = max(0.006, 0.02 * size)
    shaft = canvas.box(x - thick / 2, foot - size, x + thick / 2, foot)
    canvas.paint(["pole"], shaft, mixed(rng, (0.1, 0.1, 0.1), (0.6, 0.6, 0.6)))
    top = foot - size
    kind = rng.random()

    if kind < 0.4:
        plate = canvas.ellipse(x, top, 0.18 * size, 0.18 * size)
        if rng.random() < 0.5:
            plate = canvas.box(x - 0.1 * size, top - 0.08 * size, x + 0.1 * size, top + 0.08 * size)
        canvas.paint(["sign"], plate, mixed(rng, rng.uniform(0, 1, 3), rng.uniform(0, 1, 3)))
        return
    if kind < 0.7:
        case = canvas.box(x - 0.04 * size, top - 0.1 * size, x + 0.04 * size, top + 0.12 * size)
        canvas.paint(["traffic light"], case, mixed(rng, (0.05, 0.05, 0.05), (0.2, 0.2, 0.2)))
        lamp = canvas.ellipse(x, top + float(rng.choice([-0.06, 0, 0.07])) * size, 0.05 * size, 0.05 * size)
        canvas.paint([], lamp, mixed(rng, (0.95, 0.2, 0.1), (0.3, 0.9, 0.5)), ["traffic light"])
        return
    arm = canvas.box(x, top, x + 0.2 * size, top + thick)
    canvas.paint(["pole"], arm, mixed(rng, (0.2, 0.2, 0.2), (0.5, 0.5, 0.5)))


def boat(canvas: Canvas, x: float, foot: float, size: float) -> None:
    """Paint a boat, with a sail or without."""
    rng = canvas.rng
    hull = canvas.polygon(
        [
            (x - size / 2, foot - 0.15 * size),
            (x + size / 2, foot - 0.18 * size),
            (x + 0.35 * size, foot),
            (x - 0.35 * size, foot),
        ]
    )
    canvas.paint(["boat"], hull, canvas.textured(mixed(rng, (0.1, 0.1, 0.2), (0.95, 0.95, 0.95)), 0.05, 1))
    if rng.random() < 0.6:
        sail = canvas.polygon(
            [(x, foot - 0.2 * size), (x, foot - 1.1 * size), (x + 0.4 * size, foot - 0.25 * size)]
        )
        canvas.paint(["boat", "sail"], sail, mixed(rng, (0.8, 0.8, 0.8), (1, 1, 1)))
    else:
        cabin = canvas.box(x - 0.2 * size, foot - 0.32 * size, x + 0.15 * size, foot - 0.16 * size)
        canvas.paint(["boat"], cabin, mixed(rng, (0.6, 0.6, 0.6), (1, 1, 1)))
