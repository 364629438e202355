"""COCO's format: what doesn't fit is refused by name, in boxes and in masks alike; nothing is written outside."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlprompt.core.errors import DataError
from vlprompt.data import load_segmentation
from vlprompt.data.coco import read_coco_file
from vlprompt.data.coco_masks import object_mask
from vlprompt.data.segmentation.convert import convert_coco, convert_indexed
from vlprompt.detection.data import read_coco

pytest.importorskip("pycocotools")

WIDTH, HEIGHT = 12, 8
SQUARE = [[2.0, 1.0, 6.0, 1.0, 6.0, 5.0, 2.0, 5.0]]
Content = dict[str, Any]


def content() -> Content:
    """Two images of 12 x 8 pixels, two classes, three objects."""
    sizes = {"width": WIDTH, "height": HEIGHT}
    box = {"bbox": [2, 1, 4, 4], "area": 16, "iscrowd": 0, "segmentation": SQUARE}
    return {
        "images": [{"id": 1, "file_name": "a.png", **sizes}, {"id": 2, "file_name": "b.png", **sizes}],
        "categories": [{"id": 7, "name": "dog"}, {"id": 9, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 7, **box},
            {"id": 2, "image_id": 1, "category_id": 9, **box},
            {"id": 3, "image_id": 2, "category_id": 9, **box},
        ],
    }


def write(folder: Path, raw: Any) -> Path:
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    for name in ("a.png", "b.png", "a.jpg"):
        Image.new("RGB", (WIDTH, HEIGHT), (9, 99, 200)).save(images / name)
    path = folder / "instances.json"
    path.write_text(raw if isinstance(raw, str) else json.dumps(raw))
    return path


def changed(key: str, number: int, **fields: Any) -> Content:
    raw = content()
    raw[key][number].update(fields)
    return raw


def without(key: str, number: int, field: str) -> Content:
    raw = content()
    del raw[key][number][field]
    return raw


RUNS = {"size": [HEIGHT, WIDTH], "counts": [0, 16, 80]}

WRONG_FOR_ALL = {
    "no list": ([1, 2], "expected an object with images"),
    "null": (None, "expected an object with images"),
    "text": ('"x"', "expected an object with images"),
    "deep": ("[" * 100_000, "nested too deeply"),
    "deep object": ('{"images":' * 50_000, "nested too deeply"),
    "nan": (json.dumps(content()).replace("[2, 1, 4, 4]", "[NaN, 1, 4, 4]"), "NaN is no number"),
    "infinity": (json.dumps(content()).replace("[2, 1, 4, 4]", "[Infinity, 1, 4, 4]"), "Infinity is no number"),
    "huge integer": (json.dumps(content()).replace("[2, 1, 4, 4]", "[2, 1, 4, 1" + "0" * 400 + "]"), "bbox"),
    "cut": (json.dumps(content())[:60], "not in COCO's format"),
    "images null": ({**content(), "images": None}, "images must be a list of objects"),
    "images of numbers": ({**content(), "images": [1]}, "images must be a list of objects"),
    "no images": ({**content(), "images": []}, "lists no images"),
    "no categories": ({**content(), "categories": []}, "lists no categories"),
    "no objects": ({**content(), "annotations": []}, "holds no objects"),
    "null file": (changed("images", 0, file_name=None), r"image 1: file_name must be a text, got None"),
    "empty file": (changed("images", 0, file_name=" "), r"image 1: file_name must be a text"),
    "null width": (changed("images", 0, width=None), r"image 1: width must be a number of pixels, got None"),
    "text width": (changed("images", 0, width="12"), r"image 1: width must hold numbers, got '12'"),
    "negative width": (changed("images", 0, width=-12), r"image 1: width must be a number of pixels"),
    "null id": (changed("images", 0, id=None), r"image number 1: id must be a whole number or a text, got None"),
    "boolean id": (changed("images", 0, id=True), r"id must be a whole number or a text, got True"),
    "null category": (changed("categories", 0, name=None), r"category 7: name must be a text, got None"),
    "null image": (changed("annotations", 0, image_id=None), r"annotation 1: image_id must be a whole number"),
    "unlisted image": (changed("annotations", 2, image_id=5), r"annotation 3 belongs to image 5, which is not listed"),
    "unlisted category": (changed("annotations", 2, category_id=5), r"annotation 3 is of category 5, which is not"),
    "same image id": (changed("images", 1, id=1), r"image 1: the id 1 is that of another entry"),
    "same image id as text": (changed("images", 1, id="1"), r"image 1: the id 1 is that of another entry"),
    "same category id": (changed("categories", 1, id=7), r"category 7: the id 7 is that of another entry"),
    "same annotation id": (changed("annotations", 1, id=1), r"annotation 1: the id 1 is that of another entry"),
    "same category name": (changed("categories", 1, name="Dog"), "two classes are called"),
    "same file": (changed("images", 1, file_name="./a.png"), r"'a.png' is the file of image 1, too"),
    "outside": (changed("images", 0, file_name="../x.png"), "leaves the image folder"),
    "absolute": (changed("images", 0, file_name="/etc/x.png"), "leaves the image folder"),
    "gone": (changed("images", 0, file_name="gone.png"), r"1 of 2 images are missing, first .*gone\.png"),
    "other size": (changed("images", 0, width=24, height=16), r"a\.png is 24 x 16 there, but the image is 12 x 8"),
    "turned size": (changed("images", 0, width=8, height=12), r"a\.png is 8 x 12 there, but the image is 12 x 8"),
    "crowd": (changed("annotations", 0, iscrowd=2), r"annotation 1: iscrowd must be 0 or 1, got 2"),
    "text box": (changed("annotations", 0, bbox="x"), r"annotation 1: bbox must be \[x, y, width, height\]"),
    "short box": (changed("annotations", 0, bbox=[1, 2, 3]), r"annotation 1: bbox must be \[x, y, width, height\]"),
    "null in box": (changed("annotations", 0, bbox=[1, 2, 3, None]), r"annotation 1: bbox must hold numbers"),
    "negative box": (changed("annotations", 0, bbox=[1, 2, -3, 3]), r"annotation 1: .* got a negative side"),
}  # fmt: skip

WRONG_BOXES = {
    "no box": (without("annotations", 0, "bbox"), r"annotation 1: bbox must be"),
    "null box": (changed("annotations", 0, bbox=None), r"annotation 1: bbox must be"),
    "box outside": (changed("annotations", 0, bbox=[20, 1, 4, 4]), r"annotation 1: the box .* lies outside its image"),
    "box before": (changed("annotations", 0, bbox=[-9, 1, 4, 4]), r"annotation 1: the box .* lies outside its image"),
}  # fmt: skip

WRONG_MASKS: dict[str, tuple[Any, str]] = {
    "null": (None, "no polygon and no run lengths"),
    "empty": ([], "no polygon and no run lengths"),
    "text": ("x", "no polygon and no run lengths"),
    "empty polygon": ([[]], "three points or more"),
    "two points": ([[1.0, 1.0, 5.0, 5.0]], "three points or more"),
    "odd": ([[1.0, 1.0, 5.0, 5.0, 3.0, 3.0, 2.0]], "three points or more"),
    "flat": (SQUARE[0], "got the numbers of one"),
    "null in polygon": ([[1.0, 1.0, 5.0, None, 3.0, 3.0]], "holds finite numbers"),
    "huge": ([[1.0, 1.0, 1e30, 5.0, 3.0, 3.0]], "far outside its image"),
    "large": ([[1.0, 1.0, 2e9, 5.0, 3.0, 3.0]], "far outside its image"),
    "one wrong of two": ([SQUARE[0], [1.0, 2.0]], "three points or more"),
    "short runs": ({**RUNS, "counts": [0, 16, 79]}, "add up to 95 pixels, its image has 12 x 8 = 96"),
    "long runs": ({**RUNS, "counts": [0, 16, 81]}, "add up to 97 pixels"),
    "very long runs": ({**RUNS, "counts": [10**12]}, "add up to"),
    "negative runs": ({**RUNS, "counts": [-4, 20, 80]}, "not negative"),
    "fractions": ({**RUNS, "counts": [0.5, 15.5, 80]}, "not negative"),
    "no counts": ({"size": [HEIGHT, WIDTH]}, "a list of numbers"),
    "no size": ({"counts": [0, 16, 80]}, "are of size None"),
    "other size": ({"size": [WIDTH, HEIGHT], "counts": [0, 16, 80]}, r"are of size \[12, 8\], its image of \[8, 12\]"),
    "huge size": ({"size": [10**9, 10**9], "counts": [10**18]}, "are of size"),
    "no compression": ({**RUNS, "counts": "é"}, "can't stand where it does"),
    "endless": ({**RUNS, "counts": "o" * 50}, "can't stand where it does"),
    "cut number": ({**RUNS, "counts": "o"}, "end inside a number"),
    "random": ({**RUNS, "counts": "5321"}, "add up to"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG_FOR_ALL)
def test_both_readers_refuse_the_same(kind: str, tmp_path: Path) -> None:
    raw, message = WRONG_FOR_ALL[kind]
    path = write(tmp_path, raw)
    with pytest.raises(DataError, match=message):
        read_coco(path, tmp_path / "images")
    with pytest.raises(DataError, match=message):
        convert_coco(path, tmp_path / "images", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", WRONG_BOXES)
def test_boxes_that_do_not_fit_are_refused(kind: str, tmp_path: Path) -> None:
    raw, message = WRONG_BOXES[kind]
    with pytest.raises(DataError, match=message):
        read_coco(write(tmp_path, raw), tmp_path / "images")


@pytest.mark.parametrize("kind", WRONG_MASKS)
def test_masks_that_do_not_fit_are_refused(kind: str, tmp_path: Path) -> None:
    shape, message = WRONG_MASKS[kind]
    path = write(tmp_path, changed("annotations", 1, segmentation=shape))
    with pytest.raises(DataError, match=f"annotation 2: .*{message}"):
        convert_coco(path, tmp_path / "images", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_byte_order_mark_and_other_spellings_of_ids(tmp_path: Path) -> None:
    raw = content()
    for key, fields in (("images", ("id",)), ("annotations", ("image_id", "category_id"))):
        for entry in raw[key]:
            for field in fields:
                entry[field] = str(entry[field])
    raw["categories"][0]["id"] = 7.0
    raw["annotations"][0]["iscrowd"] = None
    for entry in raw["annotations"]:
        del entry["id"]
    path = write(tmp_path, "\ufeff" + json.dumps(raw))
    data = read_coco(path, tmp_path / "images")
    assert data.classnames == ("dog", "cat")
    assert [len(entry.labels) for entry in data.objects] == [2, 1]

    names = copy.deepcopy(content())
    for entry in names["images"]:
        entry["id"] = f"image-{entry['id']}"
    for entry in names["annotations"]:
        entry["image_id"] = f"image-{entry['image_id']}"
    assert len(read_coco(write(tmp_path, names), tmp_path / "images")) == 2


def test_boxes_are_cut_at_the_border_and_counted(tmp_path: Path) -> None:
    raw = content()
    raw["annotations"][0]["bbox"] = [8, 4, 9, 9]
    raw["annotations"][1]["bbox"] = [0, 0, WIDTH + 0.4, HEIGHT]  # rounding
    raw["annotations"][2]["bbox"] = [3, 3, 0, 2]
    raw["annotations"].append(
        {**raw["annotations"][0], "id": 4, "image_id": 2, "bbox": [1e30 * 0, 0, 1e30, 4]}
    )
    path = write(tmp_path, raw)
    with pytest.warns(UserWarning, match="objects") as warned:
        data = read_coco(path, tmp_path / "images")
    assert data.objects[0].boxes.tolist() == [[8, 4, WIDTH, HEIGHT], [0, 0, WIDTH, HEIGHT]]
    assert data.objects[1].boxes.tolist() == [[0, 0, WIDTH, 4]]
    messages = [str(warning.message) for warning in warned]
    assert any("2 of 4 objects reach beyond their image and are cut" in message for message in messages)
    assert any("1 of 4 objects have no area and are left out" in message for message in messages)

    for entry in raw["annotations"]:
        entry["bbox"] = [1, 1, 0, 0]
    with pytest.raises(DataError, match="no object with an area"):
        read_coco(write(tmp_path, raw), tmp_path / "images")


def test_an_image_on_its_side_is_measured_as_it_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, changed("images", 0, width=HEIGHT, height=WIDTH))
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "images" / "a.png", exif=turned)
    data = read_coco(path, tmp_path / "images")
    assert data.image(0).size == data.objects[0].size == (HEIGHT, WIDTH)
    path.write_text(json.dumps(content()))
    with pytest.raises(DataError, match="stored as 12 x 8, EXIF orientation 6; images are read upright"):
        read_coco(path, tmp_path / "images")


def test_run_lengths_are_those_of_pycocotools() -> None:
    from pycocotools import mask as coco

    rng = np.random.default_rng(0)
    for _ in range(60):
        height, width = (int(side) for side in rng.integers(1, 40, 2))
        pixels = rng.random((height, width)) < rng.random()
        if rng.random() < 0.5:
            pixels = np.sort(pixels, axis=0)
        runs = coco.encode(np.asfortranarray(pixels.astype(np.uint8)))
        compressed = {"size": [height, width], "counts": runs["counts"].decode()}
        assert np.array_equal(object_mask(compressed, (width, height), "x"), pixels)

        flat = pixels.T.flatten()
        changes = np.flatnonzero(np.diff(flat)) + 1
        counts = np.diff([0, *changes, flat.size]).tolist()
        listed = {"size": [height, width], "counts": [0, *counts] if flat[0] else counts}
        assert np.array_equal(object_mask(listed, (width, height), "x"), pixels)


def test_polygons_are_cut_at_the_border() -> None:
    from pycocotools import mask as coco

    # A square that reaches 4 pixels beyond the left and the upper border.
    shape = [[-4.0, -4.0, 5.0, -4.0, 5.0, 5.0, -4.0, 5.0]]
    expected = np.zeros((HEIGHT, WIDTH), bool)
    expected[:5, :5] = True
    assert np.array_equal(object_mask(shape, (WIDTH, HEIGHT), "x"), expected)
    assert not object_mask([[-5.0, -5.0, -1.0, -5.0, -1.0, -1.0]], (WIDTH, HEIGHT), "x").any()

    rng = np.random.default_rng(1)
    for _ in range(30):  # inside, it is what pycocotools draws
        polygon = (rng.random((5, 2)) * (WIDTH, HEIGHT)).flatten().tolist()
        drawn = coco.decode(coco.frPyObjects([polygon], HEIGHT, WIDTH))[..., 0]
        assert np.array_equal(object_mask([polygon], (WIDTH, HEIGHT), "x"), drawn.astype(bool))


def test_objects_without_a_pixel_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path, changed("annotations", 0, segmentation=[[1.0, 1.0, 1.0, 1.0, 1.0, 1.0]]))
    with pytest.warns(UserWarning, match="1 objects cover no pixel"):
        assert convert_coco(path, tmp_path / "images", tmp_path / "out") == {"dog": 0, "cat": 2}


NAMES = ["../../x", "/tmp/absolute", "tv/monitor", "..", "a\\b", ".hidden", "nul", "100% wool", "a\nb"]


@pytest.mark.parametrize("name", NAMES)
def test_labels_are_no_paths_and_are_read_back(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "source", changed("categories", 0, name=name))
    before = sorted(tmp_path.rglob("*"))
    out = tmp_path / "a" / "b" / "out"
    for split in ("train", "val"):
        convert_coco(path, tmp_path / "source" / "images", out, split)
    assert all(new.is_relative_to(tmp_path / "a") for new in set(tmp_path.rglob("*")) - set(before))
    assert len(list((out / "annotations" / "val").iterdir())) == 2
    data = load_segmentation(f"per_class:{out}", "test")
    assert set(data.classnames) == {" ".join(name.replace("_", " ").split()), "cat"}
    assert len(data) == 3


def test_two_images_may_not_share_a_mask(tmp_path: Path) -> None:
    path = write(tmp_path, changed("images", 1, file_name="a.jpg"))
    with pytest.raises(DataError, match=r"the masks of a\.png and a\.jpg would share a file"):
        convert_coco(path, tmp_path / "images", tmp_path / "out")
    numbers = tmp_path / "numbers"
    numbers.mkdir()
    Image.new("L", (WIDTH, HEIGHT), 1).save(numbers / "a.png")
    with pytest.raises(DataError, match=r"a\.jpg and a\.png have one name"):
        convert_indexed(numbers, tmp_path / "images", {"x": 1}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def files(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def test_converting_again_leaves_no_stale_masks(tmp_path: Path) -> None:
    path = write(tmp_path, content())
    images, again, fresh = tmp_path / "images", tmp_path / "again", tmp_path / "fresh"
    convert_coco(path, images, again, "val")
    convert_coco(path, images, again)
    val = {name: data for name, data in files(again).items() if "val" in name}

    raw = content()
    del raw["annotations"][1], raw["images"][1], raw["annotations"][1]
    path.write_text(json.dumps(raw))
    Image.new("RGB", (WIDTH, HEIGHT), (1, 2, 3)).save(images / "other.png")
    (images / "other.png").replace(images / "a.png")  # another image of the same name
    convert_coco(path, images, again)
    convert_coco(path, images, fresh)
    assert {name: data for name, data in files(again).items() if "val" not in name} == files(fresh)
    assert {name: data for name, data in files(again).items() if "val" in name} == val

    (again / "annotations/train/dog/mine.png").write_bytes(b"the user's own")
    with pytest.raises(
        DataError, match=r"1 files that no conversion wrote, for example annotations/train/dog/mine"
    ):
        convert_coco(path, images, again)
    (again / "annotations/train/dog/mine.png").unlink()
    record = json.loads((again / "conversion_train.json").read_text())
    (again / "conversion_train.json").write_text(json.dumps({**record, "whole": False}))  # it was killed
    (again / "annotations/train/cat").mkdir()
    (again / "annotations/train/cat/b.png").write_bytes(b"half")
    convert_coco(path, images, again)
    assert {name: data for name, data in files(again).items() if "val" not in name} == files(fresh)


def test_images_behind_links_are_linked_themselves(tmp_path: Path) -> None:
    path = write(tmp_path, content())
    images = tmp_path / "images"
    (images / "a.png").rename(tmp_path / "real.png")
    (images / "a.png").symlink_to("../real.png")
    convert_coco(path, images, tmp_path / "deep" / "out")
    copied = tmp_path / "deep/out/images/train/a.png"
    assert copied.read_bytes() == (tmp_path / "real.png").read_bytes()
    assert not copied.is_symlink()


def test_a_pipe_instead_of_a_file(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(DataError, match="no regular file"):
        read_coco_file(tmp_path / "pipe.json", tmp_path, boxes=True)
    with pytest.raises(DataError, match="can't read"):
        read_coco_file(tmp_path / "nowhere.json", tmp_path, boxes=True)
