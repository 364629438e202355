"""Fingerprints: other images, labels, names or cards are other data; an unrelated file changes nothing."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.layouts import make, write_image
from tests.data.segmentation.pairs_layouts import medvlsm, voc
from vlprompt.core.errors import DataError, UnknownNameError
from vlprompt.data import load_card, load_dataset
from vlprompt.data.fingerprint import (
    captions_fingerprint,
    data_fingerprint,
    missing_captions,
    missing_data,
)
from vlprompt.data.images import FileReader


def rewrite(path: Path) -> None:
    """Write the same bytes at another time."""
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000_000))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five images of each of two classes."""
    root = tmp_path / "animals"
    for label, name in enumerate(("cat", "dog")):
        for number in range(5):
            write_image(root / name / f"{number}.png", label)
    return root


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Six images with masks and one phrase."""
    root = tmp_path / "polyps"
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True)
    for number in range(6):
        write_image(root / "images" / f"{number}.png", number)
        mask = np.zeros((4, 4), np.uint8)
        mask[number % 4, :] = 255
        Image.fromarray(mask).save(root / "masks" / f"{number}.png")
    (root / "phrase.txt").write_text("a polyp")
    return root


@pytest.mark.parametrize(
    "name",
    ["scenes/shape", "scenes/shape_colour@sketch", "digits", "scenes/masks", "scenes/masks-unseen@sketch"],
)
def test_embedded_data_have_none(name: str, tmp_path: Path) -> None:
    assert data_fingerprint(name, tmp_path) == ""
    assert missing_data(name, tmp_path) is None


def _another_image(root: Path) -> None:
    write_image(root / "cat" / "new.png", 0)


def _image_written_again(root: Path) -> None:
    rewrite(root / "dog" / "3.png")


def _image_resized(root: Path) -> None:
    path = root / "dog" / "3.png"
    before = path.stat()
    Image.new("RGB", (9, 9)).save(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _image_renamed(root: Path) -> None:
    (root / "cat" / "0.png").rename(root / "cat" / "00.png")


def _label_changed(root: Path) -> None:
    shutil.move(root / "cat" / "0.png", root / "dog" / "zero.png")


def _class_renamed(root: Path) -> None:
    (root / "classnames.txt").write_text("cat = house cat\n")


CHANGES = [
    _another_image, _image_written_again, _image_resized, _image_renamed, _label_changed, _class_renamed,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_folder_that_changed(change: Callable[[Path], None], folder: Path) -> None:
    name = f"folder:{folder}"
    before = data_fingerprint(name)
    assert len(before) == 12
    assert int(before, 16) >= 0
    assert data_fingerprint(name) == before
    change(folder)
    assert data_fingerprint(name) != before


def test_files_that_no_split_reads_do_not_count(folder: Path, tmp_path: Path) -> None:
    before = data_fingerprint(f"folder:{folder}")
    (folder / "README.md").write_text("hello")
    (folder / "cat" / "notes.txt").write_text("hello")
    (folder / "cat" / ".hidden.png").write_bytes(b"x")
    (tmp_path / "beside.png").write_bytes(b"x")
    rewrite(folder / "README.md")
    assert data_fingerprint(f"folder:{folder}") == before


def test_no_image_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("an image was read")

    monkeypatch.setattr(FileReader, "read", refuse)
    monkeypatch.setattr(FileReader, "key", refuse)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert data_fingerprint(f"folder:{folder}")


def test_folder_with_splits_and_without_a_test_part(folder: Path) -> None:
    shutil.copytree(folder, folder / "train")
    shutil.copytree(folder / "cat", folder / "val" / "cat")
    shutil.rmtree(folder / "cat")
    shutil.rmtree(folder / "dog")
    before = data_fingerprint(f"folder:{folder}")
    rewrite(folder / "val" / "cat" / "4.png")
    assert data_fingerprint(f"folder:{folder}") != before
    assert missing_data(f"folder:{folder}") is None


def test_csv_table(folder: Path) -> None:
    table = folder / "table.csv"
    rows = [f"{label}/{number}.png,{label}" for label in ("cat", "dog") for number in range(5)]
    table.write_text("\n".join(["path,label", *rows]))
    name = f"csv:{table}"
    before = data_fingerprint(name)

    rewrite(table)  # the same rows
    assert data_fingerprint(name) == before
    rewrite(folder / "cat" / "2.png")
    after_image = data_fingerprint(name)
    assert after_image != before
    table.write_text("\n".join(["path,label", *rows[:-1], "dog/4.png,cat"]))
    assert data_fingerprint(name) not in (before, after_image)


@pytest.mark.filterwarnings("ignore:.*is it whole", "ignore:.*is not the published one")
@pytest.mark.parametrize(
    "name", ["eurosat", "dtd", "oxford_flowers", "mnist", "elevater_voc-2007-classification"]
)
@pytest.mark.parametrize("way", ["first", "last"])
def test_cards(name: str, way: str, tmp_path: Path) -> None:
    card = load_card(name)
    source = card.source
    while way == "last" and source.otherwise is not None:
        source = source.otherwise
    assert data_fingerprint(name, tmp_path) == "absent"
    make(card, source, tmp_path)
    before = data_fingerprint(name, tmp_path)
    assert before not in ("", "absent")
    (tmp_path / "unrelated.jpg").write_bytes(b"x")
    assert data_fingerprint(name, tmp_path) == before

    endings = {".jpg", ".png", ".zip", ".gz", ".ppm", ".tif"}
    files = sorted(p for p in tmp_path.rglob("*") if p.suffix in endings and p.parent != tmp_path)
    files = files or sorted(p for p in tmp_path.rglob("*ubyte*") if p.is_file())
    rewrite(files[0])
    assert data_fingerprint(name, tmp_path) != before


def test_card_file_counts(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cards = tmp_path / "cards"
    cards.mkdir()
    shutil.copytree(folder, tmp_path / "data" / "animals" / "images")
    lists = {
        part: {"format": "folders", "path": ""} for part in ("train", "test")
    }  # the same images in both, which nobody checks here
    card = {
        "title": "animals", "task": "classification", "classnames": ["cat", "dog"], "templates": ["a {}."],
        "source": {"kind": "images", "options": {"folders": ["animals"], "images": "images", "lists": lists,
                                                 "own_names": ["cat", "dog"]}},
        "paper": "-", "licence": "-",
    }  # fmt: skip
    (cards / "animals.yaml").write_text(json.dumps(card))
    monkeypatch.setenv("VLPROMPT_CARDS", str(cards))
    before = data_fingerprint("animals", tmp_path / "data")
    assert len(before) == 12
    assert len(load_dataset("animals", "test", root=tmp_path / "data")) == 10
    (cards / "animals.yaml").write_text(json.dumps({**card, "templates": ["the {}."]}))
    assert data_fingerprint("animals", tmp_path / "data") != before


def test_pairs_of_images_and_masks(pairs: Path) -> None:
    name = f"pairs:{pairs}"
    seen = {data_fingerprint(name)}
    rewrite(pairs / "masks" / "2.png")
    seen.add(data_fingerprint(name))
    rewrite(pairs / "images" / "5.png")
    seen.add(data_fingerprint(name))
    (pairs / "phrase.txt").write_text("a growth")
    seen.add(data_fingerprint(name))
    assert len(seen) == 4
    (pairs / "notes.txt").write_text("hello")
    assert data_fingerprint(name) in seen


def test_records_with_phrases(tmp_path: Path) -> None:
    medvlsm(tmp_path, {"train": 4, "val": 2, "test": 2}, ["polyp"])
    name = f"prompts:{tmp_path}"
    before = data_fingerprint(name)
    path = tmp_path / "anns" / "test.json"
    path.write_text(path.read_text().replace("polyp", "growth"))
    assert data_fingerprint(name) != before


def test_segmentation_card(tmp_path: Path) -> None:
    assert data_fingerprint("voc2012_seg", tmp_path) == "absent"
    voc(tmp_path)
    before = data_fingerprint("voc2012_seg", tmp_path)
    assert len(before) == 12
    rewrite(next((tmp_path / "VOCdevkit" / "VOC2012" / "SegmentationClass").iterdir()))
    assert data_fingerprint("voc2012_seg", tmp_path) != before


@pytest.mark.parametrize(
    "name", ["folder:{}/no", "csv:{}/no.csv", "pairs:{}/no", "prompts:{}/no", "coco:{}/a.json:{}"]
)
def test_absent_data_of_ones_own(name: str, tmp_path: Path) -> None:
    name = name.replace("{}", str(tmp_path))
    assert data_fingerprint(name) == "absent"
    sentence = missing_data(name)
    assert sentence is not None
    assert str(tmp_path) in sentence


@pytest.mark.parametrize("name", ["oxford_pets", "imagenetv2", "voc2012_seg"])
def test_absent_cards_say_how_to_get_them(name: str, tmp_path: Path) -> None:
    assert data_fingerprint(name, tmp_path) == "absent"
    sentence = missing_data(name, tmp_path)
    assert sentence is not None
    card = load_card(name)
    assert (f"`vlprompt data prepare {name}`" in sentence) == bool(card.archives)
    assert "Without it:" in sentence


def test_incomplete_data_are_refused(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text("path,wrong\na.png,cat\n")
    with pytest.raises(DataError, match="no column 'label'"):
        data_fingerprint(f"csv:{table}")
    assert "no column 'label'" in str(missing_data(f"csv:{table}"))


@pytest.mark.parametrize("function", [data_fingerprint, missing_data])
def test_unknown_names(function: Callable[[str], object]) -> None:
    with pytest.raises(UnknownNameError, match="oxford_pets"):
        function("oxford_pet")
    with pytest.raises(UnknownNameError, match="scenes/shape"):
        function("scenes/shap")


def test_boxes(folder: Path) -> None:
    annotations = folder / "boxes.json"
    annotations.write_text("{}")
    name = f"coco:{annotations}:{folder / 'cat'}"
    before = data_fingerprint(name)
    assert missing_data(name) is None
    rewrite(folder / "cat" / "1.png")
    middle = data_fingerprint(name)
    rewrite(annotations)
    assert len({before, middle, data_fingerprint(name)}) == 3


def test_captions(folder: Path, tmp_path: Path) -> None:
    assert captions_fingerprint("scenes:100") == ""
    assert missing_captions("scenes:100") is None
    for number in range(5):
        (folder / "cat" / f"{number}.txt").write_text(f"cat number {number}")
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for path in sorted((folder / "cat").iterdir()):
            tar.add(path, path.name)
    (folder / "table.csv").write_text("image,caption\ncat/1.png,a cat\n")

    files = {
        f"folder:{folder / 'cat'}": folder / "cat" / "1.png",
        f"csv:{folder / 'table.csv'}": folder / "cat" / "1.png",
        f"tar:{tmp_path}/*.tar": tmp_path / "shard.tar",
    }
    for name, path in files.items():
        before = captions_fingerprint(name)
        assert len(before) == 12
        assert missing_captions(name) is None
        rewrite(path)
        assert captions_fingerprint(name) != before

    before = captions_fingerprint(f"folder:{folder / 'cat'}")
    (folder / "cat" / "1.txt").write_text("a cat that sleeps")
    assert captions_fingerprint(f"folder:{folder / 'cat'}") != before


@pytest.mark.parametrize("name", ["folder:{}/no", "csv:{}/no.csv", "tar:{}/*.tar"])
def test_absent_captions(name: str, tmp_path: Path) -> None:
    name = name.format(tmp_path)
    assert captions_fingerprint(name) == "absent"
    assert str(tmp_path) in str(missing_captions(name))
