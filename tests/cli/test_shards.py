"""Shards, long lists and searches on the command line: what is printed, and how a command ends."""

from __future__ import annotations

from pathlib import Path

import pytest

import vlprompt
from tests.commands import Command
from tests.shards.archives import png, write_tar
from vlprompt.saved.prompts import save

parquet = pytest.importorskip("pyarrow.parquet")


@pytest.fixture
def prompt(tmp_path: Path) -> str:
    learner = vlprompt.create_learner("zero_shot", vlprompt.create_backbone("tiny"), ["circle", "star"])
    save(learner, tmp_path / "prompt")
    return str(tmp_path / "prompt")


def test_shards_are_encoded_and_named(command: Command, tmp_path: Path, prompt: str) -> None:
    write_tar(tmp_path / "a.tar", {"0.png": png(0), "1.jpg": b"no image", "2.txt": b"words"})
    answer = command("encode", f"tar:{tmp_path}/*.tar", "--output", str(tmp_path / "features"))
    assert answer.status == 1  # an image could not be read
    assert "1 members with the ending .txt were not looked at" in answer.out
    assert "2 images in 1 shards: 1 unreadable" in answer.out

    answer = command(
        "predict", prompt, f"tar:{tmp_path}/*.tar", "--output", str(tmp_path / "named"), "--topk", "1"
    )
    assert answer.status == 1
    rows = parquet.read_table(tmp_path / "named" / "parts" / "a.tar.parquet").to_pylist()
    assert rows[0]["labels"][0] in ("circle", "star")

    answer = command("predict", prompt, f"tar:{tmp_path}/*.tar")
    assert answer.status == 2
    assert "--output FOLDER" in answer.err
    answer = command("scan", f"tar:{tmp_path}/*.tar", "--detector", prompt)
    assert answer.status == 2
    assert "zero_shot, which can't scan" in answer.err
    answer = command("scan", str(tmp_path), "--detector", prompt, "--on", "ray")
    assert answer.status == 2
    assert "--on ray is for shards" in answer.err


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (("predict", "PROMPT", "tar:*.tar", "--output", "o", "--names", "names.txt"), "--names"),
        (("predict", "PROMPT", "tar:*.tar", "--output", "o", "--csv", "t.csv"), "--csv"),
        (("predict", "PROMPT", "a.png", "--nearest"), "--nearest"),
        (("predict", "PROMPT", "a.png", "--names", "names.txt", "--class", "a"), "--class"),
        (("predict", "PROMPT", "a.png", "--column", "picture"), "--column"),
        (("predict", "model.onnx", "a.png", "--names", "names.txt"), "--names"),
        (("scan", "tar:*.tar", "--detector", "PROMPT", "--calibrate", "clean"), "--calibrate"),
        (("scan", "tar:*.tar", "--detector", "PROMPT", "--top", "3"), "--top"),
        (("scan", "images", "--detector", "PROMPT", "--column", "picture"), "--column"),
        (("scan", "images", "--detector", "PROMPT", "--false-alarms", "0.1"), "--false-alarms"),
        (("encode", "tar:*.tar", "--output", "o", "--on", "processes:²"), "processes:N takes a number"),
        (("predict", "PROMPT", "a.png", "tar:*.tar", "--output", "o"), "one pattern"),
    ],
)
def test_options_without_effect_are_refused(
    command: Command, tmp_path: Path, prompt: str, words: tuple[str, ...], option: str
) -> None:
    write_tar(tmp_path / "0.tar", {"0.png": png(0)})
    places = {"PROMPT": prompt, "tar:*.tar": f"tar:{tmp_path}/*.tar", "o": str(tmp_path / "o")}
    answer = command(*(places.get(word, word) for word in words))
    assert answer.status == 2
    assert option in answer.err


def test_a_list_of_names(command: Command, tmp_path: Path, prompt: str) -> None:
    (tmp_path / "names.txt").write_text("a red circle\na blue star\na green square\n")
    (tmp_path / "0.png").write_bytes(png(0))
    names = str(tmp_path / "names.txt")
    answer = command("predict", prompt, str(tmp_path / "0.png"), "--names", names, "--topk", "2")
    assert answer.status == 0
    assert sum(name in answer.out for name in ("a red circle", "a blue star", "a green square")) == 2
    assert (tmp_path / "names.txt.names" / "names.json").is_file()


def test_a_search_needs_a_section_and_a_file(command: Command) -> None:
    answer = command("search")
    assert answer.status == 2
    assert "vlprompt search search_coop_tiny.yaml" in answer.err
    answer = command("search", "coop_tiny.yaml")
    assert answer.status == 2
    assert "says nothing of what is searched" in answer.err
