"""Every segmentation card reads a miniature copy of each layout it knows, and each pair gets the mask it should."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.segmentation import pairs_layouts as lay
from vlprompt.core.errors import DataError
from vlprompt.data import load_card, load_segmentation
from vlprompt.data.cards import card_names
from vlprompt.data.prepare import explain, status
from vlprompt.data.segmentation import MaskDataset

pytestmark = pytest.mark.filterwarnings("ignore:.*is it whole")
COUNTS = {"train": 6, "val": 2, "test": 3}
CAMUS = [["Left ventricular cavity of the heart.", "Left ventricular cavity in the cardiac ultrasound."],
         ["Myocardium of the heart.", "Myocardium in the cardiac ultrasound."],
         ["Left atrium cavity of the heart.", "Left atrium cavity in the cardiac ultrasound."]]  # fmt: skip
PROMPTS = {
    "kvasir_seg": ("kvasir_polyp", ["polyp"]),
    "clinicdb": ("clinicdb_polyp", ["polyp"]),
    "bkai_igh": ("bkai_polyp", ["polyp"]),
    "dfu": ("dfu", ["foot ulcer"]),
    "isic2016": ("isic", ["skin melanoma"]),
    "busi": ("busi", ["Tumor in the breast ultrasound image."]),
    "chexlocalize": ("chexlocalize", ["Airspace Opacity in a chest Xray.", "Edema in a chest Xray."]),
}


def number_of(data: MaskDataset, index: int) -> int:
    red, green, _ = data[index].image.getpixel((0, 0))  # type: ignore[misc]
    return int(red + 256 * green)


@pytest.mark.parametrize("name", PROMPTS)
def test_records_of_medvlsm(name: str, tmp_path: Path) -> None:
    folder, phrases = PROMPTS[name]
    lay.medvlsm(tmp_path / folder, COUNTS, phrases)
    card = load_card(name)
    for split, count in COUNTS.items():
        data = load_segmentation(name, split, root=tmp_path)
        assert len(data) == count * len(phrases)
        assert data.classnames == card.classnames
        for i in range(len(data)):
            said = phrases[i % len(phrases)]
            assert data[i].phrase == said
            assert data.classnames[data[i].label].casefold() in said.casefold()
            np.testing.assert_array_equal(data[i].mask, lay.bar(number_of(data, i), i % len(phrases)))


def test_camus_tells_equal_names_of_two_folders_apart(tmp_path: Path) -> None:
    lay.medvlsm(
        tmp_path / "camus",
        COUNTS,
        CAMUS,
        {"train": "train", "val": "train", "test": "test"},
        mask_folders=True,
    )
    train, test = (load_segmentation("camus", s, root=tmp_path) for s in ("train", "test"))
    assert {Path(str(s.source)).name for s in train.samples} >= {
        Path(str(s.source)).name for s in test.samples
    }
    assert (len(train), len(test)) == (18, 9)  # nothing is taken for a copy
    assert {number_of(train, i) for i in range(18)} == set(range(6))
    assert {number_of(test, i) for i in range(9)} == {8, 9, 10}
    for data in (train, test):
        for i in range(len(data)):
            np.testing.assert_array_equal(data[i].mask, lay.bar(number_of(data, i), i % 3))
            assert data.samples[i].phrase in CAMUS[i % 3]
    again = load_segmentation("camus", "train", root=tmp_path)
    assert [s.phrase for s in again.samples] == [s.phrase for s in train.samples]
    assert len({s.phrase for s in train.samples}) > 3  # of both wordings


def _kvasir(root: Path) -> None:
    for i in range(20):
        lay.image_file(root / "Kvasir-SEG/images" / f"cju{i}.jpg", i)
        grey = lay.bar(i) * 250 + 3  # JPEG files are never quite black and white
        grey[0, 11] = 40
        lay.mask_file(root / "Kvasir-SEG/masks" / f"cju{i}.jpg", grey, 1)


def _clinicdb(root: Path) -> None:
    for i in range(20):
        lay.image_file(root / "CVC-ClinicDB/PNG/Original" / f"{i + 1}.png", i)
        lay.mask_file(root / "CVC-ClinicDB/PNG/Ground Truth" / f"{i + 1}.png", lay.bar(i))


def _bkai(root: Path) -> None:
    for i in range(20):
        lay.image_file(root / "bkai-igh-neopolyp/train/train" / f"{i}.jpeg", i)
        path = root / "bkai-igh-neopolyp/train_gt/train_gt" / f"{i}.jpeg"
        path.parent.mkdir(parents=True, exist_ok=True)
        colour = (250, 4, 0) if i % 2 else (3, 251, 6)  # neoplastic or not
        Image.fromarray(lay.bar(i)[..., None] * np.array(colour, np.uint8)).save(path, "PNG")


def _dfu(root: Path) -> None:
    for i in range(20):
        lay.image_file(root / "DFUC2022/DFUC2022_train_images" / f"1{i:05d}.jpg", i)
        lay.mask_file(root / "DFUC2022/DFUC2022_train_masks" / f"1{i:05d}.png", lay.bar(i))


def _isic(root: Path) -> None:
    for part, count, first in (("Training", 20, 0), ("Test", 5, 40)):
        for i in range(first, first + count):
            folder = root / "ISIC2016"
            lay.image_file(folder / f"ISBI2016_ISIC_Part1_{part}_Data" / f"ISIC_{i:07d}.jpg", i)
            mask = folder / f"ISBI2016_ISIC_Part1_{part}_GroundTruth" / f"ISIC_{i:07d}_Segmentation.png"
            lay.mask_file(mask, lay.bar(i))


def _busi(root: Path) -> None:
    for i in range(20):
        kind = ("benign", "malignant", "normal")[i % 3]
        folder = root / "Dataset_BUSI_with_GT" / kind
        lay.image_file(folder / f"{kind} ({i + 1}).png", i)
        whole = lay.bar(i) * (kind != "normal")
        upper = whole.copy()
        upper[4:] = 0
        lay.mask_file(folder / f"{kind} ({i + 1})_mask.png", upper)
        if kind == "benign":  # the rest of the mask is in a second file
            lay.mask_file(folder / f"{kind} ({i + 1})_mask_1.png", whole - upper)


ORIGINALS: dict[str, Callable[[Path], None]] = {
    "kvasir_seg": _kvasir, "clinicdb": _clinicdb, "bkai_igh": _bkai, "dfu": _dfu, "isic2016": _isic, "busi": _busi,
}  # fmt: skip


@pytest.mark.parametrize("name", ORIGINALS)
def test_original_downloads(name: str, tmp_path: Path) -> None:
    ORIGINALS[name](tmp_path)
    seen: list[int] = []
    for split in ("train", "val", "test"):
        data = load_segmentation(name, split, root=tmp_path)
        for i in range(len(data)):
            number = number_of(data, i)
            mask = lay.bar(number)
            if name == "busi":
                mask[4:] = mask[4:] * (number % 3 == 0)
                mask *= number % 3 != 2
            np.testing.assert_array_equal(data[i].mask, mask)
            assert data[i].phrase == load_card(name).templates[0].format(load_card(name).classnames[0])
            seen.append(number)
    expected = [*range(20), *range(40, 45)] if name == "isic2016" else list(range(20))
    assert sorted(seen) == expected  # nothing lost, nothing in two parts


def test_an_option_that_the_files_at_hand_have_no_use_for_is_refused(tmp_path: Path) -> None:
    _clinicdb(tmp_path)
    with pytest.raises(
        DataError, match=r"clinicdb: the files here are read in a way without the option 'prompt'"
    ):
        load_segmentation("clinicdb", "test", root=tmp_path, prompt=3)
    assert len(load_segmentation("clinicdb", "test", root=tmp_path, threshold=60)) > 0


def test_voc_reads_palette_files_by_index_and_leaves_borders_out(tmp_path: Path) -> None:
    lay.voc(tmp_path)
    parts = {s: load_segmentation("voc2012_seg", s, root=tmp_path) for s in ("train", "val", "test")}
    images = {s: {number_of(d, i) for i in range(len(d))} for s, d in parts.items()}
    assert images["test"] == {1000, 1001, 1002, 1003}  # the official val part
    assert images["train"] | images["val"] == set(range(20))
    assert not images["train"] & images["val"]
    assert len(images["val"]) == 2
    test = parts["test"]
    assert [(s.label, s.phrase) for s in test.samples[:2]] == [(0, "airplane."), (19, "tv monitor.")]
    first, second = test[0], test[1]
    np.testing.assert_array_equal(first.mask[0], [1, 1, 0, 0, 0, 255, 0, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(second.mask[0], [0, 0, 1, 1, 1, 255, 0, 0, 0, 0, 0, 0])
    every = load_segmentation("voc2012_seg", "test", root=tmp_path, queries="all")
    assert len(every) == 4 * 20
    assert every[5].mask.max() == 255
    assert not (every[5].mask == 1).any()


def test_cityscapes_reads_label_ids(tmp_path: Path) -> None:
    lay.cityscapes(tmp_path)
    data = load_segmentation("cityscapes_seg", "test", root=tmp_path)
    assert [data.classnames[s.label] for s in data.samples[:3]] == ["road", "car", "road"]
    np.testing.assert_array_equal(data[1].mask[0], [0, 0, 0, 1, 255, 255] + [255] * 6)  # 0 and 4 are void
    parts = {s: load_segmentation("cityscapes_seg", s, root=tmp_path) for s in ("train", "val")}
    assert sum(len(d.images()) for d in parts.values()) == 20


@pytest.mark.parametrize("name", card_names("segmentation"))
def test_every_card_is_explained_and_its_absence_too(name: str, tmp_path: Path) -> None:
    card = load_card(name)
    assert "masks of phrases" in explain(card)
    found = status(card, tmp_path)
    assert found.state == "absent"
    assert "looked for" in found.problems[0]


def test_status_compares_sizes_and_reads_pairs(tmp_path: Path) -> None:
    lay.medvlsm(tmp_path / "kvasir_polyp", {"train": 800, "val": 100, "test": 100}, ["polyp"])
    assert status(load_card("kvasir_seg"), tmp_path).sizes == {"train": 800, "val": 100, "test": 100}
    (tmp_path / "kvasir_polyp/masks/900_0.png").write_bytes(b"no image")
    found = status(load_card("kvasir_seg"), tmp_path, decode=True)
    assert found.state == "incomplete"
    assert "900_0.png" in found.problems[0]
