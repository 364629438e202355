from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.segmentation import pairs_layouts as lay
from vlprompt.core.errors import DataError, UnknownNameError
from vlprompt.data import load_segmentation
from vlprompt.data.segmentation import MaskRule, read_mask
from vlprompt.data.segmentation.augment import JointAugmentation
from vlprompt.data.segmentation.base import MaskedImage, MaskSample
from vlprompt.data.segmentation.convert import convert_coco, convert_indexed
from vlprompt.data.segmentation.reading import MaskFiles


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGB", "RGBA", "LA"])
def test_binary_masks_of_every_kind_of_file(mode: str, tmp_path: Path) -> None:
    image = Image.fromarray(lay.bar(1) * 255).convert(mode)
    image.save(tmp_path / "m.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png"), lay.bar(1))


def test_whole_and_empty_masks(tmp_path: Path) -> None:
    for value, inside in ((0, 0), (255, 1), (7, 1)):
        Image.new("L", (4, 3), value).save(tmp_path / "m.png")
        assert (read_mask(tmp_path / "m.png") == inside).all()


def test_what_is_refused_of_masks(tmp_path: Path) -> None:
    path = tmp_path / "m.png"
    Image.fromarray(np.array([[1, 2]], np.uint8)).save(path)
    with pytest.raises(DataError, match=r"holds 2 values \(1, 2\)"):  # neither is ground
        read_mask(path)
    Image.new("RGB", (4, 3), (255, 0, 0)).save(path)
    with pytest.raises(DataError, match="is a colour image"):
        read_mask(path)
    assert read_mask(path, MaskRule(threshold=127)).all()
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DataError, match=r"m\.png"):
        read_mask(path)
    with pytest.raises(DataError, match="the mask does not exist"):
        read_mask(tmp_path / "n.png")


def _palette(indices: np.ndarray, colours: list[tuple[int, int, int]]) -> Image.Image:
    image = Image.fromarray(indices.astype(np.uint8), "P")
    image.putpalette([channel for colour in colours for channel in colour])
    return image


WHITE, BLACK, RED, DARK = (255, 255, 255), (0, 0, 0), (255, 0, 0), (0, 0, 60)


@pytest.mark.parametrize("colours", [(BLACK, WHITE), (BLACK, RED), (BLACK, DARK)])
def test_a_palette_of_two_colours_is_read_by_its_colours(
    colours: tuple[tuple[int, int, int], ...], tmp_path: Path
) -> None:
    bar = lay.bar(1)
    _palette(bar, list(colours)).save(tmp_path / "m.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png"), bar)
    # The same image with the palette the other way round: black is number 1.
    _palette(1 - bar, list(colours[::-1])).save(tmp_path / "m.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png"), bar)
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png", MaskRule(threshold=0)), bar)
    np.testing.assert_array_equal(
        read_mask(tmp_path / "m.png", values=(0,)), bar
    )  # class numbers stay numbers
    # All of one colour.
    _palette(bar * 0, [WHITE, BLACK]).save(tmp_path / "m.png")
    assert read_mask(tmp_path / "m.png").all()
    _palette(bar * 0 + 1, [WHITE, BLACK]).save(tmp_path / "m.png")
    assert not read_mask(tmp_path / "m.png").any()
    _palette(bar * 0 + 1, [BLACK, RED]).save(tmp_path / "m.png")
    assert read_mask(tmp_path / "m.png").all()


def test_palettes_that_leave_open_what_is_inside_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.png"
    _palette(lay.bar(1), [WHITE, RED]).save(path)
    with pytest.raises(DataError, match=r"2 colours \(#ff0000, #ffffff\)"):
        read_mask(path)
    _palette(lay.bar(1), [BLACK, BLACK]).save(path)
    with pytest.raises(DataError, match="its palette gives several of them one colour"):
        read_mask(path)
    _palette(np.array([[0, 1, 2]]), [BLACK, RED, WHITE]).save(path)
    with pytest.raises(DataError, match="3 colours"):
        read_mask(path)
    ignored = read_mask(path, MaskRule(ignore=(2,)))
    assert ignored.tolist() == [[0, 1, 255]]


@pytest.mark.parametrize("ground", [(0, 0, 0), (255, 255, 255), (10, 200, 30)])
@pytest.mark.parametrize("threshold", [None, 127])
def test_a_mask_in_the_transparency(ground: tuple[int, ...], threshold: int | None, tmp_path: Path) -> None:
    bar = lay.bar(1)
    image = Image.new("RGB", (bar.shape[1], bar.shape[0]), ground)
    image.putalpha(Image.fromarray(bar * 255))
    image.save(tmp_path / "m.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png", MaskRule(threshold)), bar)
    image.convert("LA").save(tmp_path / "m.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png", MaskRule(threshold)), bar)


def test_colours_and_transparency_must_agree(tmp_path: Path) -> None:
    bar, path = lay.bar(1), tmp_path / "m.png"
    painted = Image.merge("RGB", [Image.fromarray(bar * value) for value in (0, 0, 60)])
    painted.putalpha(255)
    painted.save(path)  # opaque: the dark colour is what is inside
    np.testing.assert_array_equal(read_mask(path), bar)
    painted.putalpha(Image.fromarray(bar * 255))
    painted.save(path)
    np.testing.assert_array_equal(read_mask(path), bar)
    painted.putalpha(Image.fromarray(255 - bar * 255))
    painted.save(path)
    with pytest.raises(DataError, match="colours and transparency that differ"):
        read_mask(path)
    Image.new("RGBA", (4, 3), (255, 255, 255, 0)).save(path)
    with pytest.raises(DataError, match="colours and transparency that differ"):
        read_mask(path)
    Image.new("RGBA", (4, 3), (0, 0, 0, 0)).save(path)
    assert not read_mask(path).any()


def test_masks_of_fractions_are_not_cut_to_whole_numbers(tmp_path: Path) -> None:
    bar, path = lay.bar(1), tmp_path / "m.tif"
    Image.fromarray(bar.astype(np.float32) * 0.7).save(path)
    np.testing.assert_array_equal(read_mask(path), bar)
    np.testing.assert_array_equal(read_mask(path, MaskRule(threshold=0.5)), bar)
    with pytest.raises(DataError, match=r"numbers from 0 to 1, of which threshold=127 leaves nothing inside"):
        read_mask(path, MaskRule(threshold=127))
    with pytest.raises(DataError, match="no whole ones"):
        read_mask(path, values=(1,))
    Image.fromarray(np.where(bar == 1, np.nan, 0).astype(np.float32)).save(path)
    for rule in (MaskRule(), MaskRule(threshold=0.5)):
        with pytest.raises(DataError, match="no numbers"):
            read_mask(path, rule)
    Image.fromarray(bar.astype(np.float32)).save(path)
    np.testing.assert_array_equal(read_mask(path, values=(1,)), bar)
    deep = Image.fromarray(bar.astype(np.uint16) * 65535)
    deep.save(tmp_path / "m.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png"), bar)
    with pytest.raises(DataError, match="values up to 65535, and threshold=127"):
        read_mask(tmp_path / "m.png", MaskRule(threshold=127))


def test_dark_colours_are_inside(tmp_path: Path) -> None:
    bar, path = lay.bar(1), tmp_path / "m.png"
    Image.merge("RGB", [Image.fromarray(bar * value) for value in (40, 0, 0)]).save(path)
    np.testing.assert_array_equal(read_mask(path), bar)
    several = np.stack([bar * 40, lay.bar(2) * 90, bar * 0], axis=-1).astype(np.uint8)
    Image.fromarray(several).save(path)
    with pytest.raises(DataError, match="pass threshold=0"):  # the advice, and what it gives
        read_mask(path)
    np.testing.assert_array_equal(read_mask(path, MaskRule(threshold=0)), several.any(-1))


def test_a_mask_is_one_image_in_a_regular_file(tmp_path: Path) -> None:
    frames = [Image.fromarray(lay.bar(i) * 255) for i in range(3)]
    frames[0].save(tmp_path / "m.tif", save_all=True, append_images=frames[1:])
    with pytest.raises(DataError, match="holds 3 images; a mask is one"):
        read_mask(tmp_path / "m.tif")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(DataError, match="no regular file"):
        read_mask(tmp_path / "pipe.png")


def test_the_size_error_mentions_orientation(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6  # the image is stored on its side
    Image.new("RGB", (30, 20)).save(tmp_path / "i.jpg", exif=turned)
    Image.new("L", (30, 20)).save(tmp_path / "m.png")
    reader = MaskFiles(tmp_path, tmp_path)
    sample = MaskSample("i.jpg", ("m.png",), "bar", 0, "pair")
    size = reader.read("i.jpg").size
    assert size == (20, 30)
    for policy in ("error", "resize"):  # resizing would squash what lies on its side
        with pytest.raises(
            DataError, match=r"the image's says 6, the mask's 1 .* One of them lies on its side"
        ):
            replace(reader, on_size_mismatch=policy).mask(sample, size)
    Image.new("L", (30, 20)).save(tmp_path / "m.png", exif=turned)
    assert reader.mask(sample, size).shape == (30, 20)


def test_ignored_values_are_neither_inside_nor_outside(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 3, 9, 255]], np.uint8)).save(tmp_path / "m.png")
    assert read_mask(tmp_path / "m.png", MaskRule(ignore=(255, 9))).tolist() == [[0, 1, 255, 255]]
    assert read_mask(tmp_path / "m.png", MaskRule(ignore=(255,)), values=(9,)).tolist() == [[0, 0, 1, 255]]


def _pair(seed: int = 0) -> MaskedImage:
    rng = np.random.default_rng(seed)
    mask = np.zeros((48, 80), np.uint8)
    mask[15:30, 20:60] = 1
    mask[0, 0] = 255
    image = np.where(mask[..., None] == 1, 200, 60) + rng.integers(0, 9, (48, 80, 3))
    return MaskedImage(Image.fromarray(image.astype(np.uint8)), mask, "bar", 0, f"pair {seed}")


def test_views_move_image_and_mask_alike_and_depend_on_the_view_alone() -> None:
    views, pair = JointAugmentation("slight"), _pair()
    shown = [views.augment(pair, 3, view) for view in range(60)]
    moved = [m for _, m in shown if not np.array_equal(m, pair.mask)]
    assert 4 <= len(moved) <= 24  # a fifth of them
    for image, mask in shown:
        assert (image.size, mask.shape) == (pair.image.size, pair.mask.shape)
        assert set(np.unique(mask)) <= {0, 1, 255}
        grey = np.asarray(image, float).mean(2)
        assert grey[mask == 1].mean() - grey[mask == 0].mean() > 100
        inner = (grey > grey.mean()) & (mask != 255)
        assert (inner & (mask == 1)).sum() / (
            inner | (mask == 1)
        ).sum() > 0.93  # the edge moves with the image
    again = views.augment(pair, 3, 7)
    assert again[0].tobytes() == shown[7][0].tobytes()
    assert len({image.tobytes() for image, _ in shown}) > 12
    assert JointAugmentation("none").augment(pair, 1, 1) == (pair.image, pair.mask)
    with pytest.raises(UnknownNameError, match="'slight'"):
        JointAugmentation("slite")


def test_turning_keeps_angles_in_images_that_are_not_square() -> None:
    """A small turn moves a point of a wide image by its distance from the centre times the angle."""
    from vlprompt.data.segmentation.augment import _affine

    mask = torch.zeros(100, 300, dtype=torch.uint8)
    mask[48:53, 248:253] = 1
    image = mask.float().expand(3, -1, -1)
    angle = 0.05
    _, turned = _affine(image, mask, 1.0, angle, 0.0, 0.0)
    rows, columns = turned.nonzero().float().mean(0)
    assert abs(float(rows - 50)) == pytest.approx(100 * np.sin(angle), abs=0.6)
    assert float(columns) == pytest.approx(150 + 100 * np.cos(angle), abs=0.6)
    _, moved = _affine(image, mask, 1.0, 0.0, 0.02, -0.02)
    assert moved.nonzero().float().mean(0).tolist() == pytest.approx([50 - 2, 250 + 6], abs=0.6)


def test_coco_polygons_and_run_lengths_become_masks(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    lay.image_file(tmp_path / "images/a.jpg", 1)
    lay.image_file(tmp_path / "images/b.jpg", 2)
    width, height = lay.SIZE
    square = [[2.0, 1.0, 6.0, 1.0, 6.0, 5.0, 2.0, 5.0]]
    counts = [0, 2 * height, width * height - 2 * height]  # column-major: the first two columns
    content = {
        "images": [{"id": i, "file_name": f"{n}.jpg", "width": width, "height": height} for i, n in enumerate("ab")],
        "categories": [{"id": 7, "name": "hot_dog"}, {"id": 9, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 0, "category_id": 9, "iscrowd": 0, "segmentation": square},
            {"id": 2, "image_id": 0, "category_id": 9, "iscrowd": 1,
             "segmentation": {"size": [height, width], "counts": counts}},
            {"id": 3, "image_id": 1, "category_id": 7, "iscrowd": 0, "segmentation": square},
        ],
    }  # fmt: skip
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    for split in ("train", "val"):
        assert convert_coco(path, tmp_path / "images", tmp_path / "out", split) == {"hot dog": 1, "cat": 1}
    by_hand = np.zeros((height, width), np.uint8)
    by_hand[1:5, 2:6] = 1
    data = load_segmentation(f"per_class:{tmp_path / 'out'}", "test")
    assert [(s.source, s.phrase) for s in data.samples] == [("val/a.jpg", "cat"), ("val/b.jpg", "hot dog")]
    np.testing.assert_array_equal(data[1].mask, by_hand)
    by_hand[:, :2] = 1  # the two objects of one class are united
    np.testing.assert_array_equal(data[0].mask, by_hand)

    content["annotations"][0]["segmentation"] = []
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"instances\.json: annotation 1: it has no polygon"):
        convert_coco(path, tmp_path / "images", tmp_path / "out")
    path.write_text('{"images": []}')
    with pytest.raises(DataError, match="not in COCO's format: KeyError 'categories'"):
        convert_coco(path, tmp_path / "images", tmp_path / "out")


def test_masks_of_class_numbers_become_masks(tmp_path: Path) -> None:
    for i in range(3):
        lay.image_file(tmp_path / "images" / f"{i}.jpg", i)
        lay.mask_file(tmp_path / "numbers" / f"{i}.png", lay.bar(i) * 4 + (lay.bar(i + 2) if i else 0), 1)
    written = convert_indexed(
        tmp_path / "numbers", tmp_path / "images", {"sea": 4, "land": 1, "sky": 9}, tmp_path / "out", "test"
    )
    assert written == {"sea": 3, "land": 2, "sky": 0}
    data = load_segmentation(f"per_class:{tmp_path / 'out'}", "test")
    for i in range(len(data)):
        number = int(Path(str(data.samples[i].source)).stem)
        expected = lay.bar(number) if data[i].phrase == "sea" else lay.bar(number + 2)
        np.testing.assert_array_equal(data[i].mask, expected)
    (tmp_path / "images/0.jpg").unlink()
    with pytest.raises(DataError, match=r"1 masks have no image in .*for example 0"):
        convert_indexed(tmp_path / "numbers", tmp_path / "images", {"sea": 4}, tmp_path / "out2")
