"""``vlprompt push``, and names on the Hub where a folder could stand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

import vlprompt
from tests.commands import Command
from tests.hub_server import HubServer, serve_hub
from vlprompt.backbones import create_backbone


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with serve_hub(tmp_path, monkeypatch) as server:
        yield server


@pytest.fixture
def prompt(tmp_path: Path) -> str:
    learner = vlprompt.create_learner("coop", create_backbone("tiny"), classnames=["circle", "square"])
    return str(vlprompt.save(learner, tmp_path / "prompt"))


def test_push_and_predict(hub: HubServer, prompt: str, tmp_path: Path, command: Command) -> None:
    pushed = command("push", prompt, "someone/shapes", "--licence", "mit")
    assert pushed.status == 0
    assert pushed.last.startswith("someone/shapes@")

    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    named = command("predict", "someone/shapes", str(tmp_path / "a.png"))
    assert named.status == 0
    assert named.out == command("predict", prompt, str(tmp_path / "a.png")).out


def test_nothing_is_pushed_where_files_are_wanted(
    hub: HubServer, prompt: str, tmp_path: Path, command: Command
) -> None:
    answer = command("push", prompt, "someone/shapes", "--write-to", str(tmp_path / "files"))
    assert answer.status == 0
    assert sorted(path.name for path in (tmp_path / "files").iterdir()) == [
        "README.md",
        "prompt.json",
        "prompt.safetensors",
    ]
    assert hub.asked == []


def test_mistakes_end_with_status_2(hub: HubServer, prompt: str, command: Command) -> None:
    hub.open_to_all = False
    refused = command("push", prompt, "someone/shapes")
    assert refused.status == 2
    assert "hf auth login" in refused.err

    missing = command("predict", "someone/nothing", "a.png")
    assert missing.status == 2
    assert "no folder 'someone/nothing' here" in missing.err
