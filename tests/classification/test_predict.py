"""Naming images: folders, lists and images in memory; what can't be read is said, not thrown."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vlprompt import create_learner, predict
from vlprompt.backbones import Backbone
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
        with pytest.raises(DataError, match=f"topk must be at least 1, got {impossible}"):
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
