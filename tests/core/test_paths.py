"""Paths as people type them, wherever an option takes one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import vlprompt
from tests.commands import Command
from vlprompt.core.files import path_fingerprint, read_tensors, write_tensors
from vlprompt.core.paths import local_or_name, looks_like_path, user_path
from vlprompt.data import load_dataset
from vlprompt.data.decoding import read_image
from vlprompt.diffusion import ViewStore
from vlprompt.experiments.config import config_path
from vlprompt.saved.paths import find_prompts, prompt_folder


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    return folder


def test_a_home_folder(home: Path) -> None:
    assert user_path("~/a/b") == home / "a" / "b"
    assert user_path("~") == home
    assert user_path("a/~/b") == Path("a/~/b")
    assert user_path("~nobody-of-this-name/x") == Path("~nobody-of-this-name/x")
    (home / "model").mkdir()
    assert local_or_name("~/model") == str(home / "model")
    assert local_or_name("someone/model") == "someone/model"


@pytest.mark.parametrize("text", ["~/x", "a/b", "x.ckpt", "./x", "..", "C:\\x"])
def test_what_can_only_be_a_path(text: str) -> None:
    assert looks_like_path(text)
    assert not looks_like_path("laion2b_s34b_b88k")


def _prompt(home: Path) -> None:
    learner = vlprompt.create_learner("coop", vlprompt.create_backbone("tiny"), ["circle", "square"])
    vlprompt.save(learner, "~/prompt")
    assert (home / "prompt" / "prompt.json").is_file()


def _images(home: Path) -> None:
    for name in ("circle", "square"):
        (home / "images" / name).mkdir(parents=True)
        for number, colour in enumerate(("red", "green", "blue", "white", "black")):
            Image.new("RGB", (40, 30), colour).save(home / "images" / name / f"{number}.png")


READERS: dict[str, Callable[[], Any]] = {
    "tensors": lambda: read_tensors(Path("~/t.safetensors")),
    "image": lambda: read_image(Path("~/images/circle/0.png")),
    "images": lambda: load_dataset("folder:~/images", "train"),
    "prompt": lambda: prompt_folder("~/prompt"),
    "prompts": lambda: find_prompts(["~/pro*"]),
    "learner": lambda: vlprompt.load("~/prompt"),
    "predict": lambda: vlprompt.predict(vlprompt.load("~/prompt"), "~/images"),
    "configuration": lambda: config_path("~/run.yaml"),
}


@pytest.fixture
def filled(home: Path) -> Path:
    _prompt(home)
    _images(home)
    write_tensors(Path("~/t.safetensors"), {"a": torch.ones(1)})
    (home / "run.yaml").write_text("task: classification\n")
    return home


def test_every_reader_knows_it(filled: Path) -> None:
    for name, read in READERS.items():
        assert read(), name
    assert path_fingerprint("~/t.safetensors") != "absent"
    assert ViewStore("~/views").root == filled / "views"
    assert not Path("~").exists()


def test_commands_know_it_also_behind_an_equals_sign(filled: Path, command: Command) -> None:
    answer = command("predict", "~/prompt", "~/images", "--csv=~/out.csv")
    assert answer.status == 0, answer.err
    assert "0.png" in (filled / "out.csv").read_text()
    assert command("check", "~/prompt").status == 0

    answer = command("run", "quickstart.yaml", "output=~/runs", "--dry-run")
    assert answer.status == 0
    assert not Path("~").exists()
