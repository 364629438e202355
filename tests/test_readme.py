"""What the README names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import vlprompt
from vlprompt.experiments.old_config import configs_dir

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_learner_is_listed() -> None:
    assert [name for name in vlprompt.list_learners() if f"`{name}`" not in README] == []


def test_every_configuration_named_exists() -> None:
    named = re.findall(r"--cfg ([\w.]+\.yaml)", README)
    assert named
    assert [name for name in named if not (configs_dir() / name).is_file()] == []


def test_every_tool_and_image_named_exists() -> None:
    named = re.findall(r"tools/\w+\.py|docs/[\w.]+", README)
    assert [name for name in named if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("name", vlprompt.__all__)
def test_every_public_name_resolves_and_is_documented(name: str) -> None:
    assert getattr(vlprompt, name).__doc__
