"""Scenes of several unlike objects, for detection: where each one is and what can be said of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlprompt.core.seeding import numpy_rng
from vlprompt.data.scenes.attributes import HELD_OUT_STYLES, STYLES, check, held_out_pairs
from vlprompt.data.scenes.render import render
from vlprompt.data.scenes.shapes import SHAPES
from vlprompt.data.scenes.spec import SceneObject, SceneSpec, draw_object, draw_scene
from vlprompt.data.scenes.wording import words

__all__ = ["BOX_TASKS", "BoxScenes", "box_classes"]

BOX_TASKS = ("shape", "shape_colour")
_SEED = 2026


def box_classes(task: str) -> dict[str, tuple[str, str | None]]:
    """Return what is to be found, name to (shape, colour or None).

    Args:
        task: ``"shape"``: every shape; ``"shape_colour"``: eight combinations of shape and colour that no pretraining
            ever showed or named, in pairs that share a shape.

    Raises:
        UnknownNameError: For another task.
    """
    check("detection task", task, BOX_TASKS)
    if task == "shape":
        return {words("shape", s)[0]: (s, None) for s in SHAPES}

    rng = numpy_rng(_SEED, "scenes", "boxes", task)
    pairs = sorted(pair for pair in held_out_pairs("shape_colour") if pair[0] in SHAPES)
    shapes = [s for s in SHAPES if sum(p[0] == s for p in pairs) >= 2]
    chosen = [str(s) for s in rng.choice(shapes, 4, replace=False)]

    # Two colours of each shape: neither the shape nor the colour alone names a class.
    classes: dict[str, tuple[str, str | None]] = {}
    for chosen_shape in chosen:
        two = [pair for pair in pairs if pair[0] == chosen_shape][:2]
        for shape, colour in two:
            classes[f"{words('colour', colour)[0]} {words('shape', shape)[0]}"] = (shape, colour)
    return classes


@dataclass(frozen=True)
class BoxScenes:
    """A sequence of scenes of one to four objects that don't touch.

    Attributes:
        count: How many.
        task: One of :data:`BOX_TASKS`, or ``""`` for pretraining: any object that pretraining may see.
        split: Any name; other names draw other scenes.
        style: Render style; with the same objects and ground. ``"any"``: every seen style, for pretraining.
        seed: Seeds everything.
        size: Side in pixels.
    """

    count: int
    task: str = ""
    split: str = "train"
    style: str = "plain"
    seed: int = 0
    size: int = 64

    def __post_init__(self) -> None:
        if self.style != "any":
            check("style", self.style, STYLES)

    def __len__(self) -> int:
        return self.count

    def spec(self, index: int) -> SceneSpec:
        """Return the scene of one item."""
        if not 0 <= index < self.count:
            raise IndexError(index)

        rng = numpy_rng(self.seed, _SEED, "scenes", "boxes", self.task, self.split, index)
        wanted = int(rng.integers(1, 5))

        objects: list[SceneObject] = []
        for _ in range(40):
            item = self._object(rng, first=not objects)
            clear = all(
                np.hypot(o.x - item.x, o.y - item.y) > 1.1 * (o.radius + item.radius) for o in objects
            )
            if len(objects) < wanted and clear:
                objects.append(item)

        style = self.style
        if style == "any":
            seen = [s for s in STYLES if s not in HELD_OUT_STYLES]
            style = "plain" if rng.random() < 0.5 else seen[int(rng.integers(len(seen)))]

        return draw_scene(rng, objects, style=style)

    def boxes(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.float32], tuple[SceneObject, ...]]:
        """Return an image (H, W, 3), its objects' boxes (n, 4) x0 y0 x1 y1 in pixels, and the objects."""
        spec = self.spec(index)
        rendered = render(spec, self.size)
        return rendered.image, np.asarray(rendered.boxes, np.float32), spec.objects

    def _object(self, rng: np.random.Generator, first: bool) -> SceneObject:
        size = "large" if first and rng.random() < 0.25 else "medium" if rng.random() < 0.7 else "small"
        if not self.task:
            return draw_object(rng, seen_only=True, size=size)
        if self.task == "shape":
            return draw_object(rng, shapes=tuple(SHAPES), size=size)

        classes = list(box_classes(self.task).values())
        shape, colour = classes[int(rng.integers(len(classes)))]
        turn = rng.random()  # half are what is looked for; the others share its shape, or its colour
        if turn < 0.5:
            return draw_object(rng, shape=shape, colour=colour, size=size)
        if turn < 0.75:
            return draw_object(rng, shape=shape, size=size)
        return draw_object(rng, shapes=tuple(SHAPES), colour=str(colour), size=size)
