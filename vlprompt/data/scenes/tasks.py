"""Classification tasks on scenes: a small ELEVATER (Li et al., NeurIPS 2022), every task in every style."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from vlprompt.core.errors import DataError
from vlprompt.core.seeding import numpy_rng
from vlprompt.data.base import ImageDataset, Reader, Sample
from vlprompt.data.scenes.attributes import (
    BACKGROUNDS,
    COLOURS,
    COUNT_WORDS,
    HELD_OUT_STYLES,
    PATTERNS,
    POSITIONS,
    SIZES,
    STYLES,
    check,
    held_out_pairs,
)
from vlprompt.data.scenes.captions import caption
from vlprompt.data.scenes.pairs import draw_pair, draw_several
from vlprompt.data.scenes.render import render
from vlprompt.data.scenes.several import draw_set, several_classes
from vlprompt.data.scenes.shapes import GLYPHS, SHAPES
from vlprompt.data.scenes.spec import SceneObject, SceneSpec, draw_object, draw_scene
from vlprompt.data.scenes.wording import words

__all__ = [
    "GENERATOR",
    "SPLITS",
    "SceneReader",
    "SceneSource",
    "build",
    "held_out_classes",
    "list_tasks",
    "task_spec",
]

#: Version of the generator: changes whenever the pixels of any task change.
GENERATOR = "scenes-1"

#: Images per class in each split.
SPLITS: dict[str, int] = {"train": 100, "val": 20, "test": 50}

_SEED = 2024
Rng = np.random.Generator


@dataclass(frozen=True)
class Task:
    """One classification task.

    Attributes:
        classnames: Plain words.
        templates: Sentences with one ``{}``.
        draw: From (class index, generator, style) to a scene of that class.
        held_out: Classes that pretraining never saw.
        several: From (class index, generator) to all classes of an image, that class first; None where there is one.
            :attr:`draw` draws them first.
    """

    classnames: tuple[str, ...]
    templates: tuple[str, ...]
    draw: Callable[[int, Rng, str], SceneSpec]
    held_out: tuple[int, ...] = ()
    several: Callable[[int, Rng], tuple[int, ...]] | None = None


@dataclass(frozen=True)
class SceneSource:
    """All that is needed to draw one image of a task."""

    task: str
    split: str
    style: str
    index: int


@dataclass(frozen=True)
class SceneReader(Reader):
    """Draws images on the fly.

    Attributes:
        size: Side in pixels.
    """

    size: int = 64

    def read(self, source: SceneSource) -> Image.Image:
        """Return the image; a pure function of the source and the size."""
        return Image.fromarray(render(task_spec(source), self.size).image)

    def caption(self, source: SceneSource) -> str:
        """See :meth:`Reader.caption`: one true sentence, the same in every style."""
        rng = numpy_rng(_SEED, "caption", source.task, source.split, source.index)
        return caption(task_spec(source), rng, balanced=True).text

    def key(self, source: SceneSource) -> str:
        """Return a name of the image's content."""
        return f"{GENERATOR}/{source.task}@{source.style}/{source.split}/{source.index}/{self.size}px"


def list_tasks() -> list[str]:
    """Return the sorted names of the classification tasks."""
    return sorted(_tasks())


def build(task: str, split: str, style: str = "plain", size: int = 64) -> ImageDataset:
    """Return one split of a task in a style; images are drawn when they are read.

    Args:
        task: One of :func:`list_tasks`.
        split: ``"train"``, ``"val"`` or ``"test"``.
        style: One of :func:`~vlprompt.data.scenes.attributes.list_styles`.
        size: Side in pixels, at least 16.

    Raises:
        UnknownNameError: For an unknown task, split or style.
        DataError: For a size that is too small.
    """
    check("task", task, _tasks())
    check("split", split, SPLITS)
    check("style", style, STYLES)
    if size < 16:
        raise DataError(f"scenes/{task}: size {size} is too small; allowed: 16 pixels and more.")

    entry = _tasks()[task]
    count = SPLITS[split] * len(entry.classnames)
    sources = [SceneSource(task, split, style, i) for i in range(count)]
    samples = tuple(Sample(source, _label(entry, source)) for source in sources)

    return ImageDataset(
        name=f"scenes/{task}" + ("" if style == "plain" else f"@{style}"),
        split=split,
        samples=samples,
        classnames=entry.classnames,
        templates=entry.templates,
        reader=SceneReader(size),
        info={
            "generator": GENERATOR,
            "style": style,
            "size": size,
            "style_held_out": style in HELD_OUT_STYLES,
            **({} if entry.several is None else {"metric": "map"}),
        },
    )


def held_out_classes(task: str) -> tuple[int, ...]:
    """Return the classes whose combination pretraining never saw (none for single-attribute tasks)."""
    check("task", task, _tasks())
    return _tasks()[task].held_out


def task_spec(source: SceneSource) -> SceneSpec:
    """Return the scene of one sample; in another style it has the same objects and ground."""
    entry = _tasks()[source.task]
    return entry.draw(source.index % len(entry.classnames), _rng(source), source.style)


def _label(entry: Task, source: SceneSource) -> int | tuple[int, ...]:
    """Return the class of a sample, or all of them where there are several."""
    label = source.index % len(entry.classnames)
    return label if entry.several is None else entry.several(label, _rng(source))


def _rng(source: SceneSource) -> Rng:
    """Return the generator of a sample, the same in every style."""
    return numpy_rng(_SEED, GENERATOR, source.task, source.split, source.index)


@lru_cache(maxsize=1)
def _tasks() -> dict[str, Task]:
    colour_pairs, colour_unseen = _pair_classes("shape_colour", tuple(COLOURS), 32)
    pattern_pairs, pattern_unseen = _pair_classes("shape_pattern", PATTERNS, 28)
    shapes = tuple(SHAPES)
    patterns = PATTERNS

    return {
        "shape": _one(
            [_first_word("shape", s) for s in shapes],
            ("a photo of a {}.", "a {}.", "the shape is a {}."),
            shape=shapes,
        ),
        "colour": _one(
            COLOURS, ("a photo of a {} object.", "the color is {}.", "something {}."), colour=tuple(COLOURS)
        ),
        "pattern": _one(
            [_first_word("pattern", p) for p in patterns],
            ("a photo of a {} object.", "the surface is {}.", "a {} pattern."),
            shapes=shapes,
            pattern=patterns,
        ),
        "glyph": _one(GLYPHS, ("a photo of the digit {}.", "the number {}.", "the digit {}."), shape=GLYPHS),
        "size": _one(
            SIZES, ("a photo of a {} object.", "the object is {}.", "a {} shape."), size=tuple(SIZES)
        ),
        "position": _one(
            POSITIONS,
            ("an object at the {}.", "the object is at the {}."),
            shapes=shapes,
            position=tuple(POSITIONS),
            radius=0.17,
        ),
        "kind": Task(("geometric shape", "digit"), ("a photo of a {}.", "this is a {}."), _draw_kind),
        "background": Task(
            tuple(_first_word("background", b) for b in BACKGROUNDS),
            ("a photo with a {}.", "an object on a {}."),
            lambda c, rng, style: draw_scene(rng, [_item(rng)], background=BACKGROUNDS[c], style=style),
        ),
        "style": Task(
            tuple(_first_word("style", s) for s in STYLES),
            ("a {} photo.", "a {} image."),
            lambda c, rng, _: draw_scene(rng, [_item(rng)], style=STYLES[c]),
        ),
        "count": Task(
            COUNT_WORDS,
            ("a photo of {} objects.", "there are {} objects."),
            lambda c, rng, style: draw_scene(rng, draw_several(rng, c + 1, shapes=shapes), style=style),
        ),
        "shape_colour": _pairs_task("colour", colour_pairs, colour_unseen),
        "shape_pattern": _pairs_task("pattern", pattern_pairs, pattern_unseen),
        "arrangement": Task(
            ("side by side", "one above the other"),
            ("two objects {}.", "a photo of two objects {}."),
            _draw_arrangement,
        ),
        "relation": Task(
            tuple(f"{a} {joint} {b}" for a, joint, b in _RELATIONS),
            ("a photo of a {}.", "a {}."),
            _draw_relation,
        ),
        "several": _several(shapes),
        "larger": Task(
            _LARGER, ("the larger object is {}.", "a photo in which the larger object is {}."), _draw_larger
        ),
    }


_RELATIONS = tuple(
    (a, joint, b)
    for joint in ("left of a", "above a")
    for a, b in (("circle", "square"), ("square", "circle"), ("star", "heart"), ("heart", "star"))
)
_LARGER = ("red", "yellow", "green", "blue", "purple", "white")


def _first_word(attribute: str, value: str) -> str:
    return words(attribute, value)[0]


def _item(rng: Rng, **fixed: Any) -> SceneObject:
    """Draw an object that is large enough to be recognised at 64 pixels."""
    size = "large" if rng.random() < 0.5 else "medium"
    return draw_object(rng, **{"size": size, **fixed})


def _one(classnames: Iterable[str], templates: tuple[str, ...], **varied: Any) -> Task:
    """A task on single objects; one of ``varied`` is a tuple and holds the value of each class."""
    names = tuple(classnames)
    constant = {k: v for k, v in varied.items() if k == "shapes" or not isinstance(v, tuple)}
    ((attribute, values),) = ((k, v) for k, v in varied.items() if k not in constant)

    def draw(label: int, rng: Rng, style: str) -> SceneSpec:
        return draw_scene(rng, [_item(rng, **constant, **{attribute: values[label]})], style=style)

    return Task(names, templates, draw)


def _several(shapes: tuple[str, ...]) -> Task:
    """Which shapes an image shows; the only task of several labels."""

    def draw(label: int, rng: Rng, style: str) -> SceneSpec:
        return draw_scene(rng, draw_set(rng, shapes, several_classes(label, rng)), style=style)

    names = tuple(_first_word("shape", s) for s in shapes)
    return Task(
        names, ("a photo of a {}.", "a {}.", "a {} among other shapes."), draw, several=several_classes
    )


def _pairs_task(other: str, pairs: tuple[tuple[str, str], ...], unseen: tuple[int, ...]) -> Task:
    names = tuple(f"{_first_word(other, value)} {_first_word('shape', shape)}" for shape, value in pairs)

    def draw(label: int, rng: Rng, style: str) -> SceneSpec:
        shape, value = pairs[label]
        return draw_scene(rng, [_item(rng, shape=shape, **{other: value})], style=style)

    return Task(names, ("a photo of a {}.", "a {}.", "this is a {}."), draw, unseen)


def _pair_classes(
    kind: str, others: tuple[str, ...], count: int
) -> tuple[tuple[tuple[str, str], ...], tuple[int, ...]]:
    """Choose a combination task's classes, half of them held out: (shape, other) and the held-out places."""
    rng = numpy_rng(_SEED, GENERATOR, "classes", kind)
    unseen = sorted(p for p in held_out_pairs(kind) if p[0] in SHAPES)
    seen = sorted((s, o) for s in SHAPES for o in others if (s, o) not in held_out_pairs(kind))
    chosen = [
        pool[i]
        for pool in (seen, unseen)
        for i in sorted(rng.choice(len(pool), min(count // 2, len(pool)), False))
    ]
    chosen = [chosen[i] for i in rng.permutation(len(chosen))]

    return tuple(chosen), tuple(i for i, pair in enumerate(chosen) if pair in held_out_pairs(kind))


def _draw_kind(label: int, rng: Rng, style: str) -> SceneSpec:
    return draw_scene(rng, [_item(rng, shapes=(tuple(SHAPES), GLYPHS)[label])], style=style)


def _draw_arrangement(label: int, rng: Rng, style: str) -> SceneSpec:
    return draw_scene(rng, draw_pair(rng, upright=label == 1), style=style)


def _draw_relation(label: int, rng: Rng, style: str) -> SceneSpec:
    first, joint, second = _RELATIONS[label]
    return draw_scene(
        rng, draw_pair(rng, shapes=(first, second), upright=joint.startswith("above")), style=style
    )


def _draw_larger(label: int, rng: Rng, style: str) -> SceneSpec:
    """A medium object of the class's colour and a small one of another of the six colours."""
    others = [c for c in _LARGER if c != _LARGER[label]]
    colours = (_LARGER[label], others[int(rng.integers(len(others)))])
    upright = bool(rng.random() < 0.5)
    order = rng.permutation(2)

    objects = []
    for along, which in zip((0.27, 0.73), order, strict=True):
        across = 0.5 + float(rng.uniform(-0.1, 0.1))
        x, y = (across, along) if upright else (along, across)
        radius = float(rng.uniform(*SIZES[("medium", "small")[which]]))
        objects.append(draw_object(rng, shapes=tuple(SHAPES), colour=colours[which], radius=radius, x=x, y=y))

    return draw_scene(rng, objects, style=style)
