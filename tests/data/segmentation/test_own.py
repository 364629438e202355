"""Folders of one's own, and everything that can be wrong with them: one clear message each."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vlprompt
from tests.data.segmentation import pairs_layouts as lay
from vlprompt.core.errors import DataError, UnknownNameError
from vlprompt.data import load_segmentation
from vlprompt.data.segmentation import label_leaks, overlaps, pair_problems


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Ten images with masks, and a phrase."""
    for i in range(10):
        lay.image_file(tmp_path / "images" / f"{i}.png", i)
        lay.mask_file(tmp_path / "masks" / f"{i}_mask.png", lay.bar(i), 1)
    (tmp_path / "phrase.txt").write_text("a bar\n")
    return tmp_path


def test_a_folder_of_pairs_is_cut_and_every_mask_fits(own: Path) -> None:
    parts = {s: load_segmentation(f"pairs:{own}", s) for s in ("train", "val", "test")}
    assert [len(d) for d in parts.values()] == [6, 2, 2]
    assert len({s.source for d in parts.values() for s in d.samples}) == 10
    for data in parts.values():
        for i in range(len(data)):
            number = int(Path(str(data.samples[i].source)).stem)
            np.testing.assert_array_equal(data[i].mask, lay.bar(number))
            assert data[i].phrase == "a bar"
    assert load_segmentation(f"pairs:{own}", phrase="the column")[0].phrase == "the column"
    assert load_segmentation(f"pairs:{own}", full_stop=True)[0].phrase == "a bar."


def test_splits_of_ones_own_are_kept(tmp_path: Path) -> None:
    for split, first in (("train", 0), ("val", 10), ("test", 20)):
        for i in range(first, first + 3):
            lay.image_file(tmp_path / split / "images" / f"{i % 10}.jpg", i)
            lay.mask_file(tmp_path / split / "masks" / f"{i % 10}.png", lay.bar(i))
    data = load_segmentation(f"pairs:{tmp_path}", "test", phrase="x")
    assert [data[i].image.getpixel((0, 0))[0] for i in range(3)] == [20, 21, 22]  # type: ignore[index]
    assert len(load_segmentation(f"pairs:{tmp_path}", "train", phrase="x")) == 3  # equal names, other folders


def test_no_phrase(own: Path) -> None:
    (own / "phrase.txt").unlink()
    with pytest.raises(DataError, match=r"6 of 6 pairs have no phrase.*phrase='"):
        load_segmentation(f"pairs:{own}")


def test_a_missing_half_is_named_on_both_sides(own: Path) -> None:
    (own / "masks" / "3_mask.png").rename(own / "masks" / "33_mask.png")
    with pytest.raises(
        DataError, match=r"2 incomplete pairs: images/3\.png has no mask.*33_mask\.png has no image"
    ):
        load_segmentation(f"pairs:{own}")
    with pytest.warns(UserWarning, match="left out"):
        data = load_segmentation(f"pairs:{own}", on_missing="skip")
    assert "images/3.png" not in {s.source for s in data.samples}


def test_sizes_that_differ(own: Path) -> None:
    lay.mask_file(own / "masks" / "0_mask.png", np.kron(lay.bar(0), np.ones((2, 2), np.uint8)))
    whole = [load_segmentation(f"pairs:{own}", s) for s in ("train", "val", "test")]
    problems = [p for data in whole for p in pair_problems(data)]
    assert len(problems) == 1
    assert "0_mask.png is 24 x 18, its image" in problems[0]
    assert "is 12 x 9" in problems[0]
    for split in ("train", "val", "test"):
        data = load_segmentation(f"pairs:{own}", split, on_size_mismatch="resize")
        for i in range(len(data)):
            np.testing.assert_array_equal(data[i].mask, lay.bar(int(Path(str(data.samples[i].source)).stem)))


def test_masks_of_many_values_need_a_threshold(own: Path) -> None:
    for i in range(10):
        lay.mask_file(
            own / "masks" / f"{i}_mask.png", lay.bar(i) * 240 + np.arange(9, dtype=np.uint8)[:, None], 1
        )
    data = load_segmentation(f"pairs:{own}")
    with pytest.raises(
        DataError, match=r"_mask\.png holds 18 values \(0, 1, 2, 3, 4, 5, \.\.\.\).*threshold=127"
    ):
        _ = data[0]
    data = load_segmentation(f"pairs:{own}", threshold=127)
    np.testing.assert_array_equal(data[0].mask, lay.bar(int(Path(str(data.samples[0].source)).stem)))


def test_empty_masks_are_kept_dropped_or_refused(own: Path) -> None:
    for i in range(10):
        lay.mask_file(own / "masks" / f"{i}_mask.png", lay.bar(i) * (i != 5))
    sizes = {s: len(load_segmentation(f"pairs:{own}", s)) for s in ("train", "val", "test")}
    dropped = {s: len(load_segmentation(f"pairs:{own}", s, empty="drop")) for s in sizes}
    assert (sum(sizes.values()), sum(dropped.values())) == (10, 9)
    split = next(s for s in sizes if sizes[s] != dropped[s])
    with pytest.raises(DataError, match=r"1 of \d masks are empty, for example images/5\.png"):
        load_segmentation(f"pairs:{own}", split, empty="error")


@pytest.mark.parametrize("inside", [1, 255, 65535])
def test_sixteen_bit_files(own: Path, inside: int) -> None:
    """A 16-bit image is scaled, not clipped; a 16-bit mask means what it says."""
    for i in range(10):
        ramp = np.linspace(0, 65535, 12 * 9).reshape(9, 12).astype(np.uint16)
        Image.fromarray(ramp).save(own / "images" / f"{i}.png")
        Image.fromarray(lay.bar(i).astype(np.uint16) * inside).save(own / "masks" / f"{i}_mask.png")
    pair = load_segmentation(f"pairs:{own}")[0]
    grey = np.asarray(pair.image)[..., 0]
    assert (int(grey[0, 0]), int(grey[-1, -1])) == (0, 255)
    assert len(np.unique(grey)) > 90
    np.testing.assert_array_equal(pair.mask, lay.bar(int(pair.record[7])))


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no folder .*images/ and masks/"):
        load_segmentation(f"pairs:{tmp_path / 'nowhere'}")
    with pytest.raises(DataError, match=r"holds no pairs\. Expected in it: images/"):
        load_segmentation(f"pairs:{tmp_path}")


def test_names_and_options_that_do_not_exist(own: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"Did you mean 'kvasir_seg'.*pairs:PATH"):
        load_segmentation("kvasir-seg")
    with pytest.raises(DataError, match=r"unknown option 'treshold'\. Did you mean 'threshold'\?"):
        load_segmentation(f"pairs:{own}", treshold=3)
    with pytest.raises(UnknownNameError, match="queries"):
        load_segmentation(f"pairs:{own}", queries="some")  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"segmentation data set: open it with vlprompt\.load_segmentation"):
        vlprompt.load_dataset("kvasir_seg")
    with pytest.raises(DataError, match=r"vlprompt\.load_segmentation\('scenes/masks@sketch'\)"):
        vlprompt.load_dataset("scenes/masks@sketch")


def test_damaged_records_are_named(tmp_path: Path) -> None:
    lay.medvlsm(tmp_path, {"train": 2}, ["polyp"])
    path = tmp_path / "anns/train.json"
    good = json.loads(path.read_text())

    def refused(records: object, message: str, **options: int) -> None:
        path.write_text(json.dumps(records))
        with pytest.raises(DataError, match=message):
            load_segmentation(f"prompts:{tmp_path}", **options)  # type: ignore[arg-type]

    refused({"a": 1}, "expected a list of records")
    refused([good[0], {"img_name": "x.png"}], r"record 2: needs img_name, mask_name and prompts")
    refused([{**good[0], "prompts": {"p0": ""}}], r"record 1: has no prompt 'p1', only p0")
    refused([{**good[0], "prompts": {"p1": []}}], "must be a phrase or a list of phrases")
    refused([{**good[0], "img_name": "../x.png"}], "leaves the folder")
    refused([{**good[0], "mask_name": "9.png"}], r"1 incomplete pairs: 000\.png lacks .*9\.png")
    refused(good, r"2 of 2 pairs have no phrase", prompt=0)
    path.write_text("[{")
    with pytest.raises(DataError, match="no valid JSON"):
        load_segmentation(f"prompts:{tmp_path}")


def test_richer_phrases_are_drawn_by_record_and_marked_as_oracle(tmp_path: Path) -> None:
    lay.medvlsm(tmp_path, {"train": 12}, ["polyp"])
    data = load_segmentation(f"prompts:{tmp_path}", prompt=2)
    assert {s.phrase.split()[0] for s in data.samples} == {"wide", "tall"}
    assert data.info["oracle_text"]
    any_of_them = load_segmentation(f"prompts:{tmp_path}", prompt=-1)
    assert {s.phrase.split()[0] for s in any_of_them.samples} == {"wide", "tall", "polyp"}
    again = load_segmentation(f"prompts:{tmp_path}", prompt=-1)
    assert [s.phrase for s in again.samples] == [s.phrase for s in any_of_them.samples]
    assert not load_segmentation(f"prompts:{tmp_path}").info["oracle_text"]


def _with_denials(root: Path) -> None:
    lay.medvlsm(root, {"train": 6, "val": 2, "test": 2}, ["polyp"])
    path = root / "anns/train.json"
    records = json.loads(path.read_text())
    for record in records[:2]:
        record["prompts"]["p1"] = "no polyp"
        lay.mask_file(root / "masks" / record["mask_name"], lay.bar(0) * 0)
    path.write_text(json.dumps(records))


def test_phrases_that_give_the_answer_away_are_mended_and_counted(tmp_path: Path) -> None:
    _with_denials(tmp_path)
    data = load_segmentation(f"prompts:{tmp_path}")
    assert {s.phrase for s in data.samples} == {"polyp"}
    assert data.info["phrases_that_deny"] == 2
    assert label_leaks(data) == {}
    with pytest.warns(UserWarning, match="2 phrases say that there is nothing to find"):
        kept = load_segmentation(f"prompts:{tmp_path}", leaks="keep")
    assert label_leaks(kept) == {"no polyp": 2}


def test_shared_images_are_found_by_name_and_by_content(tmp_path: Path) -> None:
    lay.medvlsm(tmp_path, {"train": 6, "val": 2, "test": 2}, ["polyp"])
    path = tmp_path / "anns/train.json"
    records = json.loads(path.read_text())
    records[0]["img_name"] = "006.png"  # of val
    path.write_text(json.dumps(records))
    with pytest.warns(UserWarning, match=r"1 training images are in val or test too and left out: 006\.png"):
        train = load_segmentation(f"prompts:{tmp_path}")
    assert len(train) == 5
    assert len(load_segmentation(f"prompts:{tmp_path}", dedupe=False)) == 6
    lay.image_file(tmp_path / "images" / "001.png", 8)  # the pixels of test's 008.png under another name
    parts = {s: load_segmentation(f"prompts:{tmp_path}", s, dedupe=False) for s in ("train", "val", "test")}
    assert overlaps(parts) == {
        ("train", "val"): [("006.png", "006.png")],
        ("train", "test"): [("001.png", "008.png")],
    }


def test_masks_by_class_and_all_classes(tmp_path: Path) -> None:
    for split, first, count in (("training", 0, 20), ("validation", 100, 2)):
        for i in range(first, first + count):
            lay.image_file(tmp_path / "images" / split / f"{i}.jpg", i)
            for label, name in enumerate(["dining_table", "person"]):
                if label == 0 or i % 2:
                    lay.mask_file(tmp_path / "annotations" / split / name / f"{i}.png", lay.bar(i, label))
    test = load_segmentation(f"per_class:{tmp_path}", "test")
    assert [(s.source, s.phrase) for s in test.samples] == [
        ("validation/100.jpg", "dining table"),
        ("validation/101.jpg", "dining table"),
        ("validation/101.jpg", "person"),
    ]
    every = load_segmentation(f"per_class:{tmp_path}", "test", queries="all")
    assert [(s.label, bool(s.masks)) for s in every.samples] == [(0, True), (1, False), (0, True), (1, True)]
    assert not every[1].mask.any()
    np.testing.assert_array_equal(every[3].mask, lay.bar(101, 1))
    train, val = (load_segmentation(f"per_class:{tmp_path}", s) for s in ("train", "val"))
    assert (len(train.images()), len(val.images())) == (18, 2)
    few = load_segmentation(f"per_class:{tmp_path}", "train", images=5, seed=3)
    assert len(few.images()) == 5
    assert all(len(pairs) == 1 + int(Path(str(s)).stem) % 2 for s, pairs in few.images().items())
    assert few.samples == load_segmentation(f"per_class:{tmp_path}", "train", images=5, seed=3).samples
    assert few.samples != load_segmentation(f"per_class:{tmp_path}", "train", images=5, seed=4).samples


def test_scenes_are_the_same_objects_in_every_style() -> None:
    plain, sketch = (load_segmentation(f"scenes/masks{s}", "test", images=5) for s in ("", "@sketch"))
    for i in range(5):
        np.testing.assert_array_equal(plain[i].mask, sketch[i].mask)
        assert plain[i].phrase == sketch[i].phrase
        assert plain.classnames[plain[i].label] in plain[i].phrase
        assert plain[i].mask.any()
        assert plain.key(i) != sketch.key(i)
    assert np.asarray(sketch[0].image).std(2).max() < 2  # drawn in grey
    assert sketch.info["style_held_out"]
    with pytest.raises(UnknownNameError, match="'sketch'"):
        load_segmentation("scenes/masks@sketsh")


def test_unseen_scenes_name_what_pretraining_never_showed() -> None:
    from vlprompt.data.scenes import held_out_pairs
    from vlprompt.data.scenes.attributes import COLOURS

    data = load_segmentation("scenes/masks-unseen", "val")
    held = {f"{colour} {shape}" for shape, colour in held_out_pairs("shape_colour")}
    said = {s.phrase.replace("digit ", "") for s in data.samples}
    assert all(phrase.split()[0] in COLOURS for phrase in said)
    renamed = {"lightning bolt": "lightning"}
    assert {p.replace(k, v) for p in said for k, v in renamed.items()} <= held
