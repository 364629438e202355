"""Commands that use a saved learner: predict, evaluate, check; named by its folder or by its run's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

import vlprompt
from tests.commands import Command


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with one saved learner."""
    folder = tmp_path_factory.mktemp("run")
    learner = vlprompt.create_learner("coop", vlprompt.create_backbone("tiny"), ["circle", "square", "star"])
    vlprompt.save(learner, folder / "cells" / "coop_seed1" / "prompt")
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with two images."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (40, 30), "white").save(folder / name)
    return folder


def test_predict_prints_a_line_per_image(command: Command, run_folder: Path, images: Path) -> None:
    answer = command("predict", run_folder, images, "--topk", 2)
    assert answer.status == 0
    lines = answer.out.splitlines()
    assert len(lines) == 2
    for line, name in zip(lines, ("a.png", "b.png"), strict=True):
        assert name in line
        assert sum(classname in line for classname in ("circle", "square", "star")) == 2


def test_predict_takes_other_classes_and_writes_a_file(
    command: Command, run_folder: Path, images: Path
) -> None:
    answer = command(
        "predict", run_folder, images, "--class", "red ball", "--class", "blue box", "--csv", "out.csv"
    )
    assert (answer.status, answer.out) == (0, "")
    text = Path("out.csv").read_text()
    assert "red ball" in text
    assert "circle" not in text


def test_predict_counts_what_can_not_be_read(command: Command, run_folder: Path, images: Path) -> None:
    (images / "c.png").write_text("no image")
    answer = command("predict", run_folder, images)
    assert answer.status == 1
    assert answer.err.endswith("1 of 3 images could not be read.\n")


def test_evaluate_prints_json(command: Command, run_folder: Path) -> None:
    answer = command("evaluate", run_folder, "--data", "digits", "--classes", "base")
    assert answer.status == 0
    record = json.loads(answer.out)
    assert record["data"].startswith("digits")
    assert record["split"] == "test"
    assert 0 <= record["accuracy"] <= 1


def test_check_says_what_is_saved(command: Command, run_folder: Path) -> None:
    answer = command("check", run_folder)
    assert answer.status == 0
    assert "whole; the learner coop" in answer.out
    assert "classes: circle, square, star" in answer.out
    assert "backbone: tiny" in answer.out


@pytest.mark.parametrize("words", [("predict",), ("evaluate", "--data", "digits"), ("check",), ("masks",)])
def test_several_prompts_are_a_mistake_that_names_them(
    command: Command, run_folder: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    learner = vlprompt.load(run_folder)
    for seed in (1, 2):
        vlprompt.save(learner, tmp_path / "two" / "cells" / f"seed{seed}" / "prompt")
    rest = ("a.png",) if words == ("predict",) else ()
    answer = command(*words, "two", *rest)
    assert answer.status == 2
    assert "two holds 2 saved prompts; name one of them" in answer.err
    assert str(Path("two/cells/seed2/prompt")) in answer.err


def test_mistakes_are_messages(command: Command, run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for words, message in (
        (("predict", "nowhere", "a.png"), "no saved prompt at 'nowhere'"),
        (("check", "empty"), "no saved prompt at 'empty'"),
        (("evaluate", run_folder, "--data", "digts"), "Did you mean 'digits'"),
        (("evaluate", run_folder, "--data", "digits", "--split", "tset"), "Did you mean 'test'"),
        (("predict", run_folder, "a.png", "--topk", "0"), "--topk"),
        (("masks", run_folder), "holds what coop learned, and no masks"),
    ):
        answer = command(*words)
        assert answer.status == 2, words
        assert message in answer.err, answer.err


def test_a_segmenter_is_no_learner(command: Command, tmp_path: Path) -> None:
    segmenter = vlprompt.create_segmenter("clipseg", vlprompt.create_backbone("tiny"), strategy="vpt")
    vlprompt.save(segmenter, tmp_path / "segmenter")
    answer = command("predict", "segmenter", "a.png")
    assert answer.status == 2
    assert "use it with vlprompt segment predict" in answer.err
