"""``vlprompt segment`` and ``vlprompt data convert``."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tests.data.segmentation.pairs_layouts as lay
import vlprompt
from tests.commands import Command


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """The folder of a run with one saved segmentation model."""
    segmenter = vlprompt.create_segmenter("clipseg", vlprompt.create_backbone("tiny"), strategy="vpt")
    vlprompt.save(segmenter, tmp_path / "run" / "cells" / "vpt_seed1" / "prompt")
    return tmp_path / "run"


def test_a_saved_model_is_evaluated_and_predicts(command: Command, run_folder: Path, tmp_path: Path) -> None:
    answer = command(
        "segment", "evaluate", run_folder, "scenes/masks@inverted", "--split", "val", "--csv", "pairs.csv"
    )
    assert answer.status == 0
    assert "scenes/masks@inverted (val, 100 pairs)" in answer.out
    assert len((tmp_path / "pairs.csv").read_text().splitlines()) == 101

    Image.new("RGB", (90, 40), "white").save("wide.png")
    answer = command(
        "segment", "predict", "wide.png", "a red circle",
        "--prompt", run_folder, "--out", "m.png", "--overlay", "o.png",
    )  # fmt: skip
    assert answer.status == 0
    assert "m.png: " in answer.last
    mask = Image.open("m.png")
    assert (mask.size, mask.mode) == ((90, 40), "L")
    assert set(np.unique(np.asarray(mask))) <= {0, 255}
    assert Image.open("o.png").size == (90, 40)


def test_mistakes_are_messages(command: Command, tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    for words, message in (
        (("segment", "predict", "b.png", "x"), "the file does not exist"),
        (("segment", "predict", "a.png", " "), "empty"),
        (("segment", "predict", "a.png", "red " * 99), "101 tokens, the text tower reads 77"),
        (("segment", "evaluate", "nowhere", "scenes/masks"), "no such file"),
        (("segment", "predict", "a.png", "x", "--model", "clipsg"), "Did you mean 'clipseg'"),
        (
            ("data", "convert", "indexed", ".", ".", "--out", "o", "--class", "cat"),
            "--class takes NAME=NUMBER",
        ),
        (("data", "convert", "indexed", ".", ".", "--out", "o", "--class", "cat=x"), "got 'cat=x'"),
        (("data", "convert", "coco", "none.json", ".", "--out", "o"), "is no COCO instance file"),
    ):
        answer = command(*words)
        assert answer.status == 2, words
        assert message in answer.err, answer.err


def test_a_folder_is_checked_before_it_is_used(command: Command, tmp_path: Path) -> None:
    lay.medvlsm(tmp_path / "own", {"train": 6, "val": 2, "test": 2}, ["polyp"])
    answer = command("segment", "check", f"prompts:{tmp_path / 'own'}")
    assert answer.status == 0
    assert "train: 6 pairs of 6 images, 0 unusable" in answer.out

    lay.mask_file(tmp_path / "own/masks/003_0.png", np.eye(5, dtype=np.uint8))
    (tmp_path / "own/images/001.png").write_bytes((tmp_path / "own/images/008.png").read_bytes())
    answer = command("segment", "check", f"prompts:{tmp_path / 'own'}")
    assert answer.status == 1
    assert "003_0.png is 5 x 5, its image" in answer.out
    assert "train and test share 1 images, for example 001.png = 008.png" in answer.out


def test_masks_of_class_numbers_are_converted(command: Command, tmp_path: Path) -> None:
    lay.image_file(tmp_path / "images/1.png", 1)
    (tmp_path / "numbers").mkdir()
    Image.fromarray(lay.bar(1) * 4).save(tmp_path / "numbers/1.png")
    answer = command(
        "data",
        "convert",
        "indexed",
        "numbers",
        "images",
        "--out",
        "out",
        "--class",
        "sea=4",
        "--split",
        "test",
    )
    assert answer.status == 0
    assert answer.out.splitlines() == ["sea: 1 masks", "read it as per_class:out"]
    data = vlprompt.load_segmentation("per_class:out", "test", root=tmp_path)
    assert len(data) == 1


def test_coco_files_are_converted(command: Command, tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    lay.image_file(tmp_path / "images/1.png", 1)
    width, height = Image.open(tmp_path / "images/1.png").size
    content = {
        "images": [{"id": 1, "file_name": "1.png", "height": height, "width": width}],
        "categories": [{"id": 7, "name": "cat"}],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 7, "segmentation": [[1, 1, 9, 1, 9, 9, 1, 9]]}
        ],
    }
    (tmp_path / "coco.json").write_text(json.dumps(content))
    answer = command("data", "convert", "coco", "coco.json", "images", "--out", "out")
    assert answer.status == 0
    assert answer.out.splitlines() == ["cat: 1 masks", "read it as per_class:out"]
    assert (tmp_path / "out/annotations/train/cat/1.png").is_file()
