"""What the README and the documents name exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import vlprompt
from vlprompt.cli.app import COMMANDS
from vlprompt.experiments.config import list_configs

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    path.name: path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
}


def test_the_readme_is_one_page() -> None:
    assert len(README.splitlines()) <= 150


def test_every_learner_is_listed() -> None:
    assert [name for name in vlprompt.list_learners() if f"`{name}`" not in README] == []


def test_every_adapter_and_segmenter_is_listed() -> None:
    names = [*vlprompt.list_adapters(), *vlprompt.list_segmenters()]
    assert [name for name in names if f"`{name}`" not in README] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_configuration_named_exists(page: str) -> None:
    configs = list_configs()
    for name in re.findall(r"(?:vlprompt run|--cfg) ([\w./]+\.yaml)", PAGES[page]):
        assert name in configs, name


@pytest.mark.parametrize("page", PAGES)
def test_every_command_named_exists(page: str) -> None:
    for name in re.findall(r"(?:^|`)vlprompt ([a-z]+)", PAGES[page], re.MULTILINE):
        assert name in COMMANDS, name


@pytest.mark.parametrize("page", PAGES)
def test_every_file_named_exists(page: str) -> None:
    folder = ROOT if page == "README.md" else ROOT / "docs"
    for target in re.findall(r"\]\(([\w./-]+)\)", PAGES[page]):
        assert (folder / target).exists(), target
    for target in re.findall(r"\btools/\w+\.py", PAGES[page]):
        assert (ROOT / target).is_file(), target


@pytest.mark.parametrize("name", vlprompt.__all__)
def test_every_public_name_resolves_and_is_documented(name: str) -> None:
    assert getattr(vlprompt, name).__doc__
