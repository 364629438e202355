"""Naming images: folders, lists and images in memory; what can't be read is said, not thrown."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from vlprompt import create_learner, load_dataset, predict
from vlprompt.backbones import Backbone
from vlprompt.classification.predict import accuracy
from vlprompt.core.errors import DataError
from vlprompt.learners import Learner

NAMES = ("dog", "red circle", "hummingbird")


@pytest.fixture(scope="module")
def learner(backbone: Backbone) -> Learner:
    return create_learner("coop", backbone, NAMES, context_length=4)


def make_image(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8))


def test_an_image_has_its_softmax(learner: Learner) -> None:
    image = make_image(0)
    row = predict(learner.train(), [image], topk=3)[0]
    with torch.no_grad():
        probs = learner(learner.backbone.preprocess(image)[None]).softmax(-1)[0]
    order = probs.argsort(descending=True).tolist()
    assert row["labels"] == [NAMES[i] for i in order]
    assert row["probs"] == pytest.approx(probs[order].tolist(), abs=1e-5)
    assert sum(row["probs"]) == pytest.approx(1, abs=1e-5)
    assert (row["image"], row["error"]) == ("image 0", "")
    assert not learner.training


def test_a_folder_is_walked_in_order_and_damaged_files_are_named(learner: Learner, tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    make_image(1).save(tmp_path / "b.png")
    make_image(2).save(tmp_path / "deep" / "er" / "a.JPG")
    whole = io.BytesIO()
    make_image(3, (200, 200)).save(whole, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(whole.getvalue()[:500])
    (tmp_path / "empty.png").touch()
    (tmp_path / "notes.txt").write_text("no image")
    table = predict(learner, tmp_path, batch_size=2)
    found = [Path(row["image"]).relative_to(tmp_path).as_posix() for row in table]
    assert found == ["b.png", "cut.jpg", "deep/er/a.JPG", "empty.png"]
    assert [bool(row["error"]) for row in table] == [False, True, False, True]
    assert "cut.jpg" in table[1]["error"]
    assert "the file is empty" in table[3]["error"]
    assert [len(row["labels"]) for row in table] == [3, 0, 3, 0]
    assert table[0]["probs"] == predict(learner, tmp_path / "b.png")[0]["probs"]
    assert str(tmp_path / "cut.jpg") in str(table).splitlines()[1]


def test_files_and_images_may_be_mixed_over_several_batches(learner: Learner, tmp_path: Path) -> None:
    images = [make_image(i) for i in range(5)]
    images[3].save(tmp_path / "three.png")
    mixed = [*images[:3], str(tmp_path / "three.png"), images[4]]
    one_pass, batches = predict(learner, mixed), predict(learner, mixed, batch_size=2)
    names = [row["image"] for row in batches]
    assert names == ["image 0", "image 1", "image 2", str(tmp_path / "three.png"), "image 4"]
    for whole, part, image in zip(one_pass, batches, images, strict=True):
        assert whole["labels"] == part["labels"] == predict(learner, [image])[0]["labels"]
        assert whole["probs"] == pytest.approx(part["probs"], abs=1e-5)
    assert len(batches) == 5


def test_modes_that_are_not_rgb(learner: Learner) -> None:
    rows = predict(learner, [make_image(0).convert(mode) for mode in ("RGB", "L", "P", "RGBA", "CMYK", "1")])
    assert not [row["error"] for row in rows if row["error"]]
    assert rows[0]["probs"] == pytest.approx(rows[3]["probs"], abs=1e-5)


def test_a_truncated_image_in_memory_stops_nothing(learner: Learner) -> None:
    whole = io.BytesIO()
    make_image(3, (200, 200)).save(whole, "JPEG")
    lazy = Image.open(io.BytesIO(whole.getvalue()[:5000]))  # the header is whole
    rows = predict(learner, [make_image(0), lazy, make_image(1)])
    assert [bool(row["error"]) for row in rows] == [False, True, False]
    assert "truncated" in rows[1]["error"]


def test_only_unreadable_images(learner: Learner, tmp_path: Path) -> None:
    table = predict(learner, [tmp_path / "missing.png"])
    assert table[0]["labels"] == []
    assert "the file does not exist" in table[0]["error"]


def test_nothing_to_name_is_said(learner: Learner, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no images \(\.bmp, .*\.webp\)"):
        predict(learner, tmp_path)
    with pytest.raises(DataError, match="no images to predict"):
        predict(learner, [])


def test_as_many_names_as_there_are(learner: Learner) -> None:
    assert len(predict(learner, [make_image(0)], topk=99)[0]["labels"]) == 3
    assert len(predict(learner, [make_image(0)], topk=1)[0]["labels"]) == 1
    for impossible in (0, -1):
        with pytest.raises(DataError, match=f"topk must be a whole number from 1 on, got {impossible}"):
            predict(learner, [make_image(0)], topk=impossible)


def test_the_table_as_text(learner: Learner, tmp_path: Path) -> None:
    table = predict(learner, [make_image(0), tmp_path / "missing, really.png"], topk=2)
    rows = list(csv.DictReader(io.StringIO(table.to_csv())))
    assert [(row["image"], row["rank"]) for row in rows] == [
        ("image 0", "1"),
        ("image 0", "2"),
        (str(tmp_path / "missing, really.png"), ""),
    ]
    assert rows[0]["label"] == table[0]["labels"][0]
    assert float(rows[0]["probability"]) == pytest.approx(table[0]["probs"][0], abs=1e-6)
    assert "does not exist" in rows[2]["error"]


# --- every form of an image


def forms(image: Image.Image, path: Path) -> dict[str, object]:
    image.save(path)
    pixels = np.asarray(image)
    return {
        "text": str(path),
        "path": path,
        "image": image,
        "bytes": path.read_bytes(),
        "bytearray": bytearray(path.read_bytes()),
        "file": io.BytesIO(path.read_bytes()),
        "array": pixels,
        "channels first": np.moveaxis(pixels, 2, 0),
        "fractions": pixels / 255,
        "tensor": torch.from_numpy(pixels.copy()).permute(2, 0, 1),
        "tensor of fractions": torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255,
        "whole numbers": pixels.astype(np.int64),
    }


def test_one_image_in_every_form(learner: Learner, tmp_path: Path) -> None:
    image = make_image(0)
    expected = predict(learner, [image])[0]["probs"]
    for form, value in forms(image, tmp_path / "a.png").items():
        table = predict(learner, value)
        assert len(table) == 1, form
        assert table[0]["probs"] == expected, form


def test_many_images_in_every_form(learner: Learner, tmp_path: Path) -> None:
    image = make_image(0)
    many = list(forms(image, tmp_path / "a.png").values())
    batch = np.stack([np.asarray(image)] * 3)
    for value, count in (
        (many, 12),
        (iter(many[:4]), 4),
        ((m for m in [image] * 5), 5),
        (batch, 3),
        ((image,), 1),
    ):
        if value is many:
            many[5].seek(0)  # type: ignore[attr-defined]  # it was read by nobody yet
        table = predict(learner, value, batch_size=2)
        assert len(table) == count
        assert len({tuple(row["labels"]) for row in table}) == 1
    assert len(predict(learner, np.asarray(image.convert("L")))) == 1


def test_a_generator_is_read_a_batch_at_a_time(learner: Learner) -> None:
    made: list[int] = []

    def images() -> Iterator[Image.Image]:
        for number in range(6):
            made.append(number)
            yield make_image(number)
        raise DataError("the generator's own mistake")

    with pytest.raises(DataError, match="the generator's own mistake"):
        predict(learner, images(), batch_size=2)
    assert made == list(range(6))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("https://example.org/a.jpg", "is an address: nothing is fetched"),
        (["s3://bucket/a.jpg"], "is an address"),
        ("file:///tmp/a.jpg", "is an address"),
        (None, "an image is .*; got NoneType"),
        (7, "got int 7"),
        ([7], "got int 7"),
        ({"image": "a.jpg"}, "got dict"),
        ([("a.jpg", 1)], "got tuple"),
        (np.zeros((3, 5, 3), np.uint8), "can be \\(channels, H, W\\) or \\(H, W, channels\\)"),
        (np.zeros((5, 6, 7), np.uint8), "pixels are .*got \\(5, 6, 7\\)"),
        (np.zeros(5), "pixels are"),
        (np.zeros((0, 5, 3)), "holds no image"),
        (np.array(["a"]), "holds numbers"),
        (np.array([[None]]), "holds numbers"),
        (io.StringIO("text"), "is binary"),
        ("", "no path of an image"),
        ("a\0b.jpg", "no path of an image"),
        (iter(()), "no images to predict"),
    ],
)
def test_what_is_no_image_is_one_sentence(learner: Learner, images: object, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        predict(learner, images)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.full((6, 5, 3), 1.5), "floats lie in \\[0, 1\\]; got 1.5 to 1.5.*learner\\(images\\)"),
        (np.full((6, 5, 3), np.nan), "floats lie in"),
        (np.full((6, 5, 3), 256), "whole numbers lie in 0 to 255"),
        (b"no image", "no image in a known format"),
        (io.BytesIO(b""), "can't read the image"),
    ],
)
def test_pixels_and_bytes_that_are_no_image_stop_nothing(
    learner: Learner, images: object, message: str
) -> None:
    table = predict(learner, [make_image(0), images])
    assert [bool(row["error"]) for row in table] == [False, True]
    assert re.search(message, table[1]["error"])


def test_a_folder_is_listed_as_data_sets_list_it(learner: Learner, tmp_path: Path) -> None:
    for path in ("a.png", ".ipynb_checkpoints/a.png", "__MACOSX/a.png", "._a.png", "b.avif"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        make_image(0).save(tmp_path / path)
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.warns(UserWarning, match="1 entry is left out, a named pipe"):
        table = predict(learner, tmp_path)
    assert [Path(row["image"]).name for row in table] == ["a.png", "b.avif"]


def test_names_of_files_stay_on_their_line(learner: Learner, tmp_path: Path) -> None:
    make_image(0).save(tmp_path / "two\nlines.png")
    os.rename(tmp_path / "two\nlines.png", os.fsencode(tmp_path) + b"/two\nlines\xff.png")
    table = predict(learner, tmp_path)
    assert table[0]["image"].endswith("two\\nlines\\xff.png")
    assert not table[0]["error"]
    assert len(str(table).splitlines()) == 1
    assert table.to_csv().encode()


@pytest.mark.skipif(os.name != "posix", reason="names that other systems don't have")
def test_the_table_is_safe_in_a_spreadsheet(backbone: Backbone, tmp_path: Path) -> None:
    learner = create_learner("zero_shot", backbone, ["=cat", "dog, brown", 'a "b"'])
    for name in ("=HYPERLINK(1).png", "a\rb.png", "fine.png"):
        make_image(1).save(tmp_path / name)
    (tmp_path / "+bad.png").write_bytes(b"")

    table = predict(learner, [tmp_path], topk=3)
    text = table.to_csv()
    rows = list(csv.reader(io.StringIO(text)))
    assert len(text.splitlines()) == len(rows) == 1 + 3 * 3 + 1
    assert not [cell for row in rows for cell in row if cell.startswith(("=", "+", "-", "@"))]
    assert {row[2] for row in rows[1:]} == {"'=cat", "dog, brown", 'a "b"', ""}
    assert [float(row[3]) for row in rows[1:] if row[3]] == pytest.approx(
        [p for row in table for p in row["probs"]], abs=1e-6
    )


def test_what_is_not_finite_is_no_prediction(backbone: Backbone) -> None:
    """The first class among NaN would be named with confidence."""
    learner = create_learner("taskres", backbone, NAMES)
    torch.nn.init.constant_(learner.get_parameter("residual"), float("nan"))
    row = predict(learner, make_image(0))[0]
    assert (row["labels"], row["probs"]) == ([], [])
    assert "NaN" in row["error"]


def test_whole_numbers_of_numpy(learner: Learner) -> None:
    assert len(predict(learner, make_image(0), topk=np.int64(2))[0]["labels"]) == 2
    with pytest.raises(DataError, match=r"topk must be a whole number from 1 on, got 2\.5"):
        predict(learner, make_image(0), topk=2.5)  # type: ignore[arg-type]


class _Pixels(nn.Module):
    """Makes pixels of an image, as a user's module may."""

    def forward(self, image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(image.resize((4, 4)), np.float32)).permute(2, 0, 1) / 255


class _OwnClassifier(nn.Module):
    """Says how bright an image is; what makes its pixels is a submodule, which only ``__getattr__`` finds."""

    def __init__(self) -> None:
        super().__init__()
        self.classnames = ["dark", "bright"]
        self.device = torch.device("cpu")
        self.preprocess = _Pixels()
        self.dropout = nn.Dropout(1.0)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        brightness = self.dropout(images).mean((1, 2, 3))
        return torch.stack([0.5 - brightness, brightness - 0.5], 1)


def test_a_module_of_ones_own_names_images() -> None:
    images = [Image.new("RGB", (8, 8), colour) for colour in ("black", "white")]
    table = predict(_OwnClassifier(), images)
    assert [row["labels"][0] for row in table] == ["dark", "bright"]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("classnames", None, r"got _OwnClassifier. It lacks classnames \(a sequence of names\)\."),
        ("classnames", "dark", r"It lacks classnames"),
        ("device", "cpu", r"It lacks device \(a torch.device\)\."),
        ("preprocess", None, r"It lacks preprocess \(a function of a PIL image\)\."),
    ],
)
def test_what_an_own_module_lacks_is_named(name: str, value: object, message: str) -> None:
    classifier = _OwnClassifier()
    setattr(classifier, name, value)
    with pytest.raises(DataError, match=message):
        predict(classifier, Image.new("RGB", (8, 8)))
    with pytest.raises(DataError, match=message):
        accuracy(classifier, load_dataset("digits", "test"))
