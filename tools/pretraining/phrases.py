"""Scenes of several objects with the phrases that name them, for pretraining the embedded segmenters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vlprompt.core.seeding import numpy_rng
from vlprompt.data.scenes.attributes import COLOURS, HELD_OUT_MASKS, HELD_OUT_STYLES, STYLES
from vlprompt.data.scenes.captions import phrase
from vlprompt.data.scenes.render import render
from vlprompt.data.scenes.shapes import GLYPHS, SHAPES
from vlprompt.data.scenes.spec import SceneObject, SceneSpec, draw_object, draw_scene
from vlprompt.data.scenes.wording import article

__all__ = ["MOST_OBJECTS", "PhraseScenes"]

MOST_OBJECTS = 4
_SEEN = tuple(shape for shape in (*SHAPES, *GLYPHS) if shape not in HELD_OUT_MASKS)
#: What a phrase says beside the kind of object, and how often; () names the shape alone.
_SAID: tuple[tuple[tuple[str, ...], float], ...] = (
    (("colour", "shape"), 0.5),
    (("shape",), 0.2),
    (("colour",), 0.15),
    (("pattern", "colour", "shape"), 0.1),
    (("pattern", "shape"), 0.05),
)
_SENTENCES = ("{}", "{}.", "{a}", "{a}.", "a photo of {a}.", "the {}.")


class PhraseScenes:
    """A sequence of scenes, and for each any number of (phrase, mask).

    Held-out styles, held-out objects and combinations that ``tiny`` never saw don't occur.

    Args:
        count: Scenes.
        seed: Seeds scenes and phrases.
        negatives: Share of phrases that name nothing in the scene; their mask is empty.
    """

    def __init__(self, count: int, seed: int = 0, negatives: float = 0.1) -> None:
        self.count = count
        self.seed = seed
        self.negatives = negatives
        self._specs: dict[int, SceneSpec] = {}

    def __len__(self) -> int:
        return self.count

    def spec(self, index: int) -> SceneSpec:
        """Return a scene of one to four objects that hardly overlap."""
        if index not in self._specs:  # every epoch asks again
            self._specs[index] = self._draw(index)
        return self._specs[index]

    def _draw(self, index: int) -> SceneSpec:
        rng = numpy_rng(self.seed, "scenes", "phrases", index)
        styles = [s for s in STYLES[1:] if s not in HELD_OUT_STYLES]
        style = "plain" if rng.random() < 0.6 else styles[int(rng.integers(len(styles)))]
        count = int(rng.integers(1, MOST_OBJECTS + 1))
        first = ("large", "medium", "small")[int(rng.choice(3, p=[0.4, 0.5, 0.1]))]
        objects = [draw_object(rng, shapes=_SEEN, seen_only=True, size=first)]

        for _ in range(30):
            size = "medium" if rng.random() < 0.75 else "small"
            other = draw_object(rng, shapes=_SEEN, seen_only=True, size=size)
            if len(objects) < count and all(_apart(o, other) for o in objects):
                objects.append(other)

        return draw_scene(rng, objects, style=style)

    def rendered(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Return the (64, 64, 3) image, and (4, 64, 8) masks of its objects, eight pixels to a byte."""
        rendered = render(self.spec(index))
        masks = np.zeros((MOST_OBJECTS, *rendered.masks.shape[1:]), bool)
        masks[: len(rendered.masks)] = rendered.masks
        return rendered.image, np.packbits(masks, axis=2)

    def phrase(self, index: int, draw: int) -> tuple[str, list[int]]:
        """Return a phrase, and the places in ``objects`` of all that it names; draws differ."""
        objects = self.spec(index).objects
        rng = numpy_rng(self.seed, "scenes", "phrase", index, draw)
        absent = rng.random() < self.negatives
        meant = self._other(rng, objects) if absent else objects[int(rng.integers(len(objects)))]
        said = _SAID[0 if absent else int(rng.choice(len(_SAID), p=[share for _, share in _SAID]))][0]
        noun = _noun(meant, said)
        text = _SENTENCES[int(rng.integers(len(_SENTENCES)))].format(noun, a=article(noun))

        return text, [
            i for i, o in enumerate(objects) if all(getattr(o, a) == getattr(meant, a) for a in said)
        ]

    def _other(self, rng: np.random.Generator, objects: Sequence[SceneObject]) -> SceneObject:
        """Draw an object that isn't there; often one of another colour than one that is."""
        while True:
            look = draw_object(rng, shapes=_SEEN, seen_only=True)
            if rng.random() < 0.5:
                shape = objects[int(rng.integers(len(objects)))].shape
                look = draw_object(rng, shape=shape, seen_only=True)
            if all((o.shape, o.colour) != (look.shape, look.colour) for o in objects):
                return look


def _apart(first: SceneObject, second: SceneObject) -> bool:
    return bool(np.hypot(first.x - second.x, first.y - second.y) > 0.9 * (first.radius + second.radius))


def _noun(item: SceneObject, said: Sequence[str]) -> str:
    if said == ("colour",):
        return f"{item.colour} object" if item.colour in COLOURS else item.colour
    return phrase(item, [a for a in said if a != "shape"])
