"""Scenes with several labels: one to four objects that don't touch, and the set of their shapes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlprompt.data.scenes.shapes import SHAPES
from vlprompt.data.scenes.spec import SceneObject, draw_object

__all__ = ["draw_set", "several_classes"]

_MOST = 4  # objects
_TRIES = 40  # places for one object, before the scene is begun anew


def several_classes(label: int, rng: np.random.Generator) -> tuple[int, ...]:
    """Draw the shapes of one image: one to four draws, of which equal ones are one.

    Args:
        label: Number of the shape that is there for certain; it comes first.
        rng: Source of randomness.

    Returns:
        The distinct numbers among :data:`SHAPES`.
    """
    count = int(rng.integers(1, _MOST + 1))
    others = rng.integers(len(SHAPES), size=count - 1)
    return tuple(dict.fromkeys([label, *(int(number) for number in others)]))


def draw_set(
    rng: np.random.Generator, shapes: Sequence[str], classes: Sequence[int]
) -> tuple[SceneObject, ...]:
    """Draw an object of each class where all can be seen.

    Args:
        rng: Source of randomness.
        shapes: Names by class.
        classes: Numbers of the shapes, at most four.
    """
    while True:  # four objects of the smallest size fit nearly always
        objects: list[SceneObject] = []
        for number in classes:
            item = _place(rng, shapes[number], objects)
            if item is None:
                break
            objects.append(item)
        if len(objects) == len(classes):
            order = rng.permutation(len(objects))
            return tuple(objects[i] for i in order)


def _place(rng: np.random.Generator, shape: str, others: Sequence[SceneObject]) -> SceneObject | None:
    """Draw an object clear of the others, or None where there is no room for it."""
    for _ in range(_TRIES):
        size = "large" if not others and rng.random() < 0.25 else "medium" if rng.random() < 0.6 else "small"
        item = draw_object(rng, shape=shape, size=size)
        if all(np.hypot(o.x - item.x, o.y - item.y) > 1.1 * (o.radius + item.radius) for o in others):
            return item
    return None
