"""Data sets of other libraries: torch, torchvision, Hugging Face, lists; and what is refused of them."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset
from torchvision.datasets import FakeData, ImageFolder
from torchvision.transforms import v2

import datasets
import vlprompt
from vlprompt.core.errors import DataError, UnknownNameError
from vlprompt.data.objects import dataset_of

NAMES = ["red", "green", "blue"]
COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


class Squares(Dataset):
    """Twelve squares of three colours; counts how often one is read."""

    def __init__(self, count: int = 12, kind: str = "pil") -> None:
        self.count = count
        self.kind = kind
        self.reads = 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if index >= self.count:
            raise IndexError
        self.reads += 1
        label = index % 3
        image = Image.new("RGB", (20, 20), COLOURS[label])
        image.putpixel((index, 0), (255, 255, 255))
        return self.converted(image), label

    def converted(self, image: Image.Image) -> Any:
        if self.kind == "array":
            return np.asarray(image)
        if self.kind == "tensor":
            return v2.functional.to_dtype(v2.functional.to_image(image), scale=True)
        return image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, (image, label) in enumerate(Squares()[k] for k in range(12)):
        place = tmp_path / "images" / NAMES[label]
        place.mkdir(parents=True, exist_ok=True)
        image.save(place / f"{i:02d}.png")
    return tmp_path / "images"


@pytest.mark.parametrize("kind", ["pil", "array", "tensor"])
def test_pixels_are_the_same_in_every_form(kind: str) -> None:
    data = dataset_of(Squares(kind=kind), classnames=NAMES)
    assert len(data) == 12
    assert data.labels == [0, 1, 2] * 4
    for i in range(12):
        assert data[i][0].tobytes() == Squares()[i][0].tobytes()
        assert data.key(i) == dataset_of(Squares(), classnames=NAMES).key(i)
    assert len({data.key(i) for i in range(12)}) == 12


def test_a_list_of_pairs_and_names_as_labels() -> None:
    pairs = [(image, NAMES[label]) for image, label in Squares()]
    data = vlprompt.load_dataset(pairs, split="test")
    assert data.classnames == ("blue", "green", "red")  # sorted, as folders are
    assert data.split == "test"
    assert [data.classnames[label] for label in data.labels] == NAMES * 4
    ordered = vlprompt.load_dataset(pairs, classnames=NAMES)
    assert ordered.labels == [0, 1, 2] * 4


def test_torchvision_says_names_and_labels_without_opening_images(folder: Path) -> None:
    foreign = ImageFolder(str(folder))
    data = vlprompt.load_dataset(foreign, shots=2, seed=1)
    assert data.classnames == ("blue", "green", "red")
    assert sorted(data.labels) == [0, 0, 1, 1, 2, 2]
    whole = vlprompt.load_dataset(f"folder:{folder}", split="all")
    assert {i.tobytes() for i, _ in data} <= {i.tobytes() for i, _ in whole}
    assert data.labels == vlprompt.load_dataset(foreign, shots=2, seed=1).labels

    both = ConcatDataset([Subset(foreign, [0, 4]), Subset(foreign, [8])])
    part = vlprompt.load_dataset(both)
    assert part.labels == [0, 1, 2]
    assert part.classnames == data.classnames


def test_a_target_transform_is_believed(folder: Path) -> None:
    foreign = ImageFolder(str(folder), target_transform=lambda label: 2 - label)
    assert vlprompt.load_dataset(foreign, classnames=NAMES).labels == [2] * 4 + [1] * 4 + [0] * 4


def test_labels_that_are_listed_are_not_read_one_by_one() -> None:
    squares = Squares()
    squares.targets = torch.tensor([i % 3 for i in range(12)])
    dataset_of(squares, classnames=NAMES)
    assert squares.reads < 6


def test_training_and_scoring_take_them() -> None:
    backbone = vlprompt.create_backbone("tiny")
    learner = vlprompt.create_learner("linear_probe", backbone, classnames=NAMES)
    vlprompt.fit(learner, Squares(kind="tensor"), Squares())  # has no names: label c is the learner's class c
    assert vlprompt.evaluate(learner, Squares())["accuracy"] == 1.0
    assert vlprompt.evaluate(learner, list(Squares()))["accuracy"] == 1.0


def test_it_goes_to_other_processes() -> None:
    data = dataset_of(Squares(), classnames=NAMES)
    again = pickle.loads(pickle.dumps(data))
    assert again.key(3) == data.key(3)


def test_hugging_face_in_memory() -> None:
    features = datasets.Features({"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=NAMES)})
    pairs = list(Squares())
    columns = {"img": [image for image, _ in pairs], "fine_label": [label for _, label in pairs]}
    foreign = datasets.Dataset.from_dict(columns, features=features)
    data = vlprompt.load_dataset(foreign)
    assert data.classnames == tuple(NAMES)
    assert data.labels == [0, 1, 2] * 4
    assert data[5][0].tobytes() == pairs[5][0].tobytes()

    encoded = vlprompt.load_dataset(foreign.cast_column("img", datasets.Image(decode=False)))
    assert encoded[5][0].tobytes() == pairs[5][0].tobytes()


def test_hugging_face_with_files_that_are_not_decoded(folder: Path) -> None:
    files = sorted(map(str, folder.rglob("*.png")))
    columns = {"image": files, "label": [Path(file).parent.name for file in files]}
    foreign = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image(decode=False))
    assert foreign[0]["image"] == {"bytes": None, "path": files[0]}

    data = vlprompt.load_dataset(foreign)
    with Image.open(files[3]) as image:
        assert data[3][0].tobytes() == image.convert("RGB").tobytes()


@pytest.fixture
def hub_folder(folder: Path, tmp_path: Path) -> str:
    """A data set of Hugging Face's layout on disk: two splits of folders of classes."""
    for split, numbers in {"train": range(9), "test": range(9, 12)}.items():
        for i in numbers:
            image, label = Squares()[i]
            place = tmp_path / "hub" / split / NAMES[label]
            place.mkdir(parents=True, exist_ok=True)
            image.save(place / f"{i:02d}.png")
    return f"hf:{tmp_path / 'hub'}"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf cache")
    datasets.disable_progress_bars()


def test_hf_reads_splits_and_cuts_validation_from_train(hub_folder: str) -> None:
    test = vlprompt.load_dataset(hub_folder, "test")
    assert test.classnames == ("blue", "green", "red")
    assert sorted(test.labels) == [0, 1, 2]

    train = vlprompt.load_dataset(hub_folder, "train")
    val = vlprompt.load_dataset(hub_folder, "val")
    keys = [{part.key(i) for i in range(len(part))} for part in (train, val, test)]
    assert [len(part) for part in keys] == [6, 3, 3]
    assert not keys[0] & keys[1]
    assert not keys[0] & keys[2]
    assert len(vlprompt.load_dataset(hub_folder, "train", validation=False)) == 9


def test_hf_splits_by_other_names(hub_folder: str) -> None:
    swapped = vlprompt.load_dataset(
        hub_folder, "train", split_names={"train": "test", "test": "train"}, validation=False
    )
    assert len(swapped) == 3
    with pytest.raises(UnknownNameError, match=r"unknown split of .* 'exam'"):
        vlprompt.load_dataset(hub_folder, "train", split_names={"train": "exam"})


def test_hf_of_one_part_is_cut(folder: Path, tmp_path: Path) -> None:
    sizes = [len(vlprompt.load_dataset(f"hf:{folder}", split)) for split in ("train", "val", "test")]
    assert sum(sizes) == 12
    assert min(sizes) == 3


def test_hf_that_is_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="the package datasets can't load it"):
        vlprompt.load_dataset("hf:someone/nothing")


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[tuple[Image.Image, int]]:
        return iter(Squares())


class Random(Squares):
    def converted(self, image: Image.Image) -> Any:
        return np.random.default_rng().integers(0, 255, (20, 20, 3), dtype=np.uint8)


def mapped(**keys: Any) -> list[dict[str, Any]]:
    return [
        {key: (image if value == "image" else label) for key, value in keys.items()}
        for image, label in Squares()
    ]


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (Stream(), {}, "needs a length and data"),
        ([], {}, "list is empty"),
        ([(1, 2, 3)], {}, "an item is .image, label., or a mapping with both; item 0 is a tuple of 3"),
        (Squares(), {}, "doesn't say what its classes are called. Pass classnames"),
        (Squares(), {"classnames": NAMES[:2]}, "item 2 has the label 2; its 2 classes have the labels 0 to 1"),
        (Random(), {"classnames": NAMES}, "differs when it is read twice.*data.transform = None"),
        ([(image, 0.5) for image, _ in Squares()], {"classnames": NAMES}, "a label is a whole number or a name"),
        ([(image, torch.eye(3)[label]) for image, label in Squares()], {"classnames": NAMES}, "whole number or a name"),
        ([(image, "red" if label else 0) for image, label in Squares()], {}, "all numbers or all names"),
        (mapped(image="image", img="image", label="label"), {"classnames": NAMES}, "'image' or 'img'; say which"),
        (mapped(photo="image", label="label"), {"classnames": NAMES}, "which key is the image.*photo, label"),
        (mapped(image="image", label="label"), {"classnames": NAMES, "image": "x"}, "no key 'x'; they have: image"),
        (Squares(), {"classnames": NAMES, "size": 3}, "unknown option 'size' of a data set object"),
        (Squares(), {"classnames": NAMES, "shots": 2, "sampling": "elevater"}, "here it is 'private'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_a_sentence(data: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        vlprompt.load_dataset(data, **options)


def test_preprocessed_images_are_counted_with_advice() -> None:
    normalised = [(v2.functional.to_image(image).float() / 64 - 2, label) for image, label in Squares()]
    with pytest.raises(DataError, match=r"floats lie in \[0, 1\]"):
        vlprompt.load_dataset(normalised, classnames=NAMES)

    fake = FakeData(6, (3, 8, 8), 3, transform=v2.ToTensor())
    mixed = [*list(Squares()), (torch.full((3, 8, 8), 7.0), 0)]
    with pytest.warns(UserWarning, match="floats lie in"):
        data = vlprompt.load_dataset(mixed, classnames=NAMES)
    assert len(data) == 12  # named and left out, as a damaged file is
    assert len(vlprompt.load_dataset(fake, classnames=NAMES)) == 6
