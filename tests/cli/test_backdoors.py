"""``vlprompt poison`` and ``vlprompt scan``."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

import vlprompt
from tests.commands import Command


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """The folder of a run with one saved scanner."""
    learner = vlprompt.create_learner("dbom", vlprompt.create_backbone("tiny"), ["circle", "square"])
    vlprompt.save(learner, tmp_path / "run" / "cells" / "dbom_seed1" / "prompt")
    return tmp_path / "run"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (32, 32), (80 * number, 20, 40)).save(folder / f"{number}.png")
    return folder


def test_poison_writes_a_copy_that_is_a_data_set(command: Command) -> None:
    answer = command("poison", "--data", "digits", "--split", "val", "--trigger", "badnets", "--trigger", "sig",
                     "--rate", 0.1, "--output", "copy")  # fmt: skip
    assert answer.status == 0
    assert answer.last.startswith("copy: 359 images, ")


def test_poison_draws_a_sheet(command: Command) -> None:
    answer = command("poison", "--sheet", "sheet.png")
    assert (answer.status, answer.last) == (0, "sheet.png")
    assert Image.open("sheet.png").width > 100


def test_poison_explains_mistakes(command: Command) -> None:
    for words, message in (
        (("--data", "digits", "--trigger", "badnet"), "Did you mean 'badnets'"),
        (("--data", "digits", "--rate", "2"), "rate"),
        (("--data", "digits", "--mode", "all"), "mode"),
    ):
        answer = command("poison", *words)
        assert answer.status == 2, words
        assert message in answer.err, answer.err


@pytest.mark.parametrize(("threshold", "status", "suspected"), [("0", 3, 3), ("1", 0, 0)])
def test_the_exit_status_says_what_a_scan_suspects(
    command: Command, images: Path, run_folder: Path, threshold: str, status: int, suspected: int
) -> None:
    answer = command("scan", images, "--detector", run_folder, "--output", "out", "--threshold", threshold)
    assert answer.status == status
    assert answer.out.splitlines()[0] == f"3 images: {suspected} suspected, 0 unreadable"
    assert answer.last == "out/report.html"
    assert len(Path("out/cleaned.txt").read_text().splitlines()) == 3 - suspected


def test_an_image_that_can_not_be_read_counts(command: Command, images: Path, run_folder: Path) -> None:
    (images / "broken.png").write_text("no image")
    answer = command("scan", images, "--detector", run_folder, "--threshold", 1)
    assert answer.status == 1
    assert "4 images: 0 suspected, 1 unreadable" in answer.out
    assert answer.last == "scans/images/report.html"


def test_scan_explains_mistakes(command: Command, images: Path, run_folder: Path, tmp_path: Path) -> None:
    coop = vlprompt.create_learner("coop", vlprompt.create_backbone("tiny"), ["circle", "square"])
    vlprompt.save(coop, tmp_path / "coop")
    for words, message in (
        (("nowhere", "--detector", run_folder), "there is no folder 'nowhere'"),
        (
            (images, "--detector", "coop"),
            "coop holds coop, which can't scan. Train a scanner: vlprompt run dbom_tiny.yaml",
        ),
        ((images, "--detector", "nothing"), "no saved prompt at 'nothing'"),
        ((images,), "--detector"),
    ):
        answer = command("scan", *words)
        assert answer.status == 2, words
        assert message in answer.err, answer.err


def test_poison_leaves_images_at_their_own_size_if_asked_to(command: Command) -> None:
    for class_name, size in (("a", (40, 30)), ("b", (21, 50))):
        folder = Path("signs", class_name)
        folder.mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", size, (30 * number, 60, 90)).save(folder / f"{number}.png")

    answer = command("poison", "--data", "folder:signs", "--size", "own", "--rate", 0.5, "--output", "copy")
    assert answer.status == 0, answer.err
    sizes = {Image.open(path).size for path in Path("copy").rglob("*.png")}
    assert sizes == {(40, 30), (21, 50)}
    wrong = command("poison", "--data", "folder:signs", "--size", "large", "--output", "other")
    assert wrong.status == 2
    assert "size" in wrong.err
