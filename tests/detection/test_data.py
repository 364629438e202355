from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlprompt.core.errors import DataError, UnknownNameError
from vlprompt.data.scenes.attributes import held_out_pairs
from vlprompt.data.scenes.boxes import BoxScenes, box_classes
from vlprompt.detection.data import DetectionData, read_coco, write_coco
from vlprompt.detection.scenes import SPLITS, scene_boxes


def test_coco_files_come_back_as_they_went(data: DetectionData, tmp_path: Path) -> None:
    again = read_coco(write_coco(data, tmp_path), tmp_path)
    assert again.classnames == data.classnames
    for i, (mine, theirs) in enumerate(zip(data.objects, again.objects, strict=True)):
        assert np.array_equal(mine.boxes, theirs.boxes)
        assert np.array_equal(mine.labels, theirs.labels)
        assert np.array_equal(mine.crowd, theirs.crowd)
        assert mine.size == theirs.size
        assert np.array_equal(np.asarray(data.image(i)), np.asarray(again.image(i)))


def test_pycocotools_reads_what_is_written(data: DetectionData, tmp_path: Path) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    read = coco.COCO(str(write_coco(data, tmp_path)))
    assert [len(read.getAnnIds(imgIds=[i])) for i in range(4)] == [2, 0, 1, 2]
    assert read.loadAnns(read.getAnnIds(imgIds=[0]))[1]["bbox"] == [30, 10, 20, 25]


def broken(kind: str, raw: dict[str, Any]) -> Any:
    if kind == "no json":
        return "{"
    if kind == "no categories":
        return {k: v for k, v in raw.items() if k != "categories"}
    if kind == "unknown image":
        raw["annotations"][0]["image_id"] = 99
    if kind == "unknown category":
        raw["annotations"][0]["category_id"] = 99
    if kind == "short box":
        raw["annotations"][0]["bbox"] = [1, 2, 3]
    if kind == "missing file":
        raw["images"][2]["file_name"] = "gone.png"
    return raw


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no json", "not in COCO's format"),
        ("no categories", "not in COCO's format: KeyError 'categories'"),
        ("unknown image", "annotation 1 belongs to image 99, which is not listed"),
        ("unknown category", "annotation 1 is of category 99, which is not listed"),
        ("short box", r"annotation 1: bbox must be \[x, y, width, height\], got \[1, 2, 3\]"),
        ("missing file", r"1 of 4 images are missing, first .*gone\.png"),
    ],
)
def test_broken_files_are_one_clear_error(
    kind: str, message: str, data: DetectionData, tmp_path: Path
) -> None:
    path = write_coco(data, tmp_path)
    changed = broken(kind, json.loads(path.read_text()))
    path.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(DataError, match=message):
        read_coco(path, tmp_path)


def test_boxes_without_area_are_left_out(data: DetectionData, tmp_path: Path) -> None:
    path = write_coco(data, tmp_path)
    raw = json.loads(path.read_text())
    raw["annotations"][0]["bbox"][2] = 0
    path.write_text(json.dumps(raw))
    with pytest.warns(UserWarning, match="1 of 5 objects have no area and are left out"):
        assert len(read_coco(path, tmp_path).objects[0].labels) == 1


def test_a_draw_is_seeded_and_keeps_images_with_their_boxes(data: DetectionData) -> None:
    few = data.few(2, seed=1)
    assert len(few) == 2
    for i, entry in enumerate(few.objects):
        number = next(k for k, o in enumerate(data.objects) if o is entry)
        assert np.array_equal(np.asarray(few.image(i)), np.asarray(data.image(number)))
    assert [id(o) for o in data.few(2, seed=1).objects] == [id(o) for o in few.objects]
    with pytest.raises(DataError, match="has 4 images, 9 were asked for"):
        data.few(9, seed=1)


def test_boxes_of_scenes_lie_around_what_is_drawn() -> None:
    scenes = BoxScenes(30, "shape")
    for i in range(30):
        image, boxes, items = scenes.boxes(i)
        assert 1 <= len(items) <= 4
        for box, item in zip(boxes, items, strict=True):
            centre = (box[:2] + box[2:]) / 128
            assert abs(centre[0] - item.x) < 0.6 * item.radius
            assert abs(centre[1] - item.y) < 0.6 * item.radius
            assert (box[2:] - box[:2]).max() <= 64 * 2.3 * item.radius + 2
        assert image.shape == (64, 64, 3)


def test_combinations_to_find_were_never_seen() -> None:
    classes = box_classes("shape_colour")
    assert len(classes) == 8
    assert {(s, c) for s, c in classes.values()} <= held_out_pairs("shape_colour")
    combinations = {
        (o.shape, o.colour)
        for i in range(200)
        for o in BoxScenes(200, "", "pretraining", "any").spec(i).objects
    }
    assert not combinations & held_out_pairs("shape_colour")
    styles = {BoxScenes(200, "", "pretraining", "any").spec(i).style for i in range(200)}
    assert "sketch" not in styles
    assert len(styles) > 3


def test_styles_share_objects_and_splits_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SPLITS, "val", 12)
    plain, sketch = scene_boxes("scenes/shape", "val"), scene_boxes("scenes/shape@sketch", "val")
    assert all(np.array_equal(a.boxes, b.boxes) for a, b in zip(plain.objects, sketch.objects, strict=True))
    assert not np.array_equal(np.asarray(plain.image(0)), np.asarray(sketch.image(0)))
    other = BoxScenes(5, "shape", "test")
    assert any(
        not np.array_equal(BoxScenes(5, "shape", "val").boxes(i)[1], other.boxes(i)[1]) for i in range(5)
    )
    for name, error, message in (
        ("coco/shape", DataError, "unknown detection data"),
        ("scenes/shpe", UnknownNameError, "shape"),
        ("scenes/shape@sketsh", UnknownNameError, "sketch"),
    ):
        with pytest.raises(error, match=message):
            scene_boxes(name, "val")
