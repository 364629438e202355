"""Scenes: pixels, masks and tasks follow from the seed alone and say what they show."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest

from vlprompt.core.errors import DataError, UnknownNameError
from vlprompt.data import scenes
from vlprompt.data.scenes.attributes import HELD_OUT_STYLES, PATTERNS, STYLES
from vlprompt.data.scenes.shapes import GLYPHS, SHAPES
from vlprompt.data.scenes.tasks import SPLITS, task_spec

DIGEST = """
import hashlib, numpy as np
from vlprompt.data import scenes
data = scenes.build("pattern", "test", "night")
print(hashlib.sha256(b"".join(np.asarray(data[i][0]).tobytes() for i in (9, 3, 77))).hexdigest())
"""


def pixels(task: str, style: str, index: int) -> np.ndarray:
    return np.asarray(scenes.build(task, "test", style)[index][0])


def test_same_pixels_in_another_process_and_order() -> None:
    other = subprocess.run([sys.executable, "-c", DIGEST], capture_output=True, text=True, check=True)
    here = {i: pixels("pattern", "night", i).tobytes() for i in (77, 9, 3)}
    assert hashlib.sha256(b"".join(here[i] for i in (9, 3, 77))).hexdigest() == other.stdout.strip()


def test_seeds_and_specs_change_the_image() -> None:
    rng = np.random.default_rng(0)
    item = scenes.SceneObject("star", "red", "dotted")
    spec = scenes.draw_scene(rng, [item], background="grainy")
    again = scenes.draw_scene(rng, [item], background="grainy")
    assert (scenes.render(spec).image == scenes.render(spec).image).all()
    assert (scenes.render(spec).image != scenes.render(again).image).any()


@pytest.mark.parametrize("shape", [*SHAPES, *GLYPHS])
def test_mask_is_where_the_object_changed_the_image(shape: str) -> None:
    item = scenes.SceneObject(shape, "red", "solid", radius=0.35)
    ground = scenes.SceneSpec((), tone="paper", seed=3)
    drawn = scenes.render(scenes.SceneSpec((item,), tone="paper", seed=3))
    changed = (drawn.image.astype(int) - scenes.render(ground).image).__abs__().sum(2)
    mask = drawn.masks[0]
    # Anti-aliased border pixels change less than half as much as those that are covered.
    assert (mask == (changed > changed.max() / 2)).mean() > 0.985
    assert 20 < mask.sum() < 64 * 64 * 0.5
    x0, y0, x1, y1 = drawn.boxes[0].astype(int)
    assert mask[y0:y1, x0:x1].sum() == mask.sum()
    assert mask[y0].any()
    assert mask[y1 - 1].any()
    assert mask[:, x0].any()
    assert mask[:, x1 - 1].any()


def test_later_objects_hide_earlier_ones_in_the_masks() -> None:
    below, above = scenes.SceneObject("square", "red"), scenes.SceneObject("circle", "blue", radius=0.15)
    drawn = scenes.render(scenes.SceneSpec((below, above)))
    assert not (drawn.masks[0] & drawn.masks[1]).any()
    assert not drawn.masks[0][32, 32]
    assert drawn.masks[1][32, 32]


def test_patterns_and_styles_are_told_apart_by_pixels() -> None:
    base = {"shape": "circle", "colour": "blue", "radius": 0.4}
    looks = [
        scenes.render(scenes.SceneSpec((scenes.SceneObject(pattern=p, **base),))).image for p in PATTERNS
    ]
    item = scenes.SceneObject("circle", "blue", radius=0.4)
    looks += [scenes.render(scenes.SceneSpec((item,), style=s)).image for s in STYLES[1:]]
    differences = [np.abs(a.astype(int) - b).mean() for a, b in pairwise(looks)]
    assert min(differences) > 2


def test_inverted_is_the_negative_of_plain() -> None:
    negative = pixels("shape", "plain", 5).astype(int) + pixels("shape", "inverted", 5)
    assert np.abs(negative - 255).max() <= 1


@pytest.mark.parametrize("size", [32, 96, 100])
def test_size_is_a_parameter(size: int) -> None:
    for style in STYLES:
        assert scenes.build("shape", "val", style, size)[0][0].size == (size, size)


def test_a_mask_grows_with_the_image() -> None:
    spec = scenes.SceneSpec((scenes.SceneObject("heart", "red"),))
    small, large = (scenes.render(spec, size).masks[0].mean() for size in (64, 256))
    assert small == pytest.approx(large, rel=0.03)


def test_there_is_enough_variety() -> None:
    assert len(scenes.list_tasks()) >= 10
    assert len(SHAPES) + len(GLYPHS) >= 24
    assert set(scenes.list_styles()) == set(STYLES)


@pytest.mark.parametrize("task", scenes.list_tasks())
def test_tasks_are_balanced_with_distinct_names(task: str) -> None:
    for split, per_class in SPLITS.items():
        data = scenes.build(task, split)
        assert np.bincount(data.labels).tolist() == [per_class] * len(data.classnames)
    assert len({n.lower() for n in data.classnames}) == len(data.classnames) >= 2
    assert 2 <= len(data.templates) <= 4
    assert all(t.count("{}") == 1 for t in data.templates)


@pytest.mark.parametrize("task", scenes.list_tasks())
def test_splits_share_no_scene_and_no_key(task: str) -> None:
    specs, keys = [], []
    for split in SPLITS:
        data = scenes.build(task, split)
        specs += [task_spec(s.source) for s in data.samples[:60]]
        keys += [data.key(i) for i in range(len(data))]
    assert len(set(specs)) == len(specs)
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    ("task", "attribute"), [("shape", "shape"), ("colour", "colour"), ("pattern", "pattern")]
)
def test_labels_are_what_is_drawn(task: str, attribute: str) -> None:
    data = scenes.build(task, "train")
    drawn: dict[int, set[str]] = {}
    for sample in data.samples[: 3 * len(data.classnames)]:
        (item,) = task_spec(sample.source).objects
        drawn.setdefault(sample.label, set()).add(getattr(item, attribute))
    assert all(len(values) == 1 for values in drawn.values())
    assert len(set.union(*drawn.values())) == len(data.classnames)


def test_several_labels_are_the_set_of_shapes_that_is_drawn() -> None:
    data = scenes.build("several", "train")
    shapes = tuple(SHAPES)
    counts = []
    for sample in data.samples[:60]:
        objects = task_spec(sample.source).objects
        assert {shapes.index(item.shape) for item in objects} == set(sample.classes)
        assert sample.classes[0] == sample.source.index % 20
        counts.append(len(objects))
        gaps = [
            np.hypot(a.x - b.x, a.y - b.y) - a.radius - b.radius
            for a in objects
            for b in objects
            if a is not b
        ]
        assert min(gaps, default=1) > 0
    assert set(counts) == {1, 2, 3, 4}


def test_every_task_exists_in_every_style_with_the_same_scenes() -> None:
    for style in STYLES:
        data = scenes.build("count", "test", style)
        assert data.name == ("scenes/count" if style == "plain" else f"scenes/count@{style}")
        assert data.info["style_held_out"] == (style in HELD_OUT_STYLES)
        assert (
            task_spec(data.samples[4].source).objects
            == task_spec(scenes.build("count", "test").samples[4].source).objects
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("shapes", "train"), "'shape'"),
        (("shape", "training"), "'train'"),
        (("shape", "train", "sketchy"), "'sketch'"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        scenes.build(*arguments)


def test_images_too_small_to_show_anything_are_refused() -> None:
    with pytest.raises(DataError, match="16 pixels"):
        scenes.build("shape", "train", size=8)


def test_contact_sheet_has_a_row_per_task_and_style() -> None:
    two = scenes.contact_sheet(["shape"], ["night"], columns=3)
    three = scenes.contact_sheet(["shape", "count"], ["night"], columns=3)
    assert three.width == two.width
    assert three.height > two.height
    assert np.asarray(two).std() > 10


def test_throughput_counts_images() -> None:
    assert scenes.throughput(seconds=0.05) > 0
