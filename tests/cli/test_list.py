"""``vlprompt list``: every kind, with a line about each name."""

from __future__ import annotations

import pytest

import vlprompt
from tests.commands import Command
from vlprompt.cli.list import Kind
from vlprompt.experiments.config import list_configs
from vlprompt.experiments.tasks import list_tasks

PUBLIC = {
    "adapters": vlprompt.list_adapters,
    "backbones": vlprompt.list_backbones,
    "configs": lambda: list(list_configs()),
    "datasets": vlprompt.list_datasets,
    "detectors": vlprompt.list_detectors,
    "learners": vlprompt.list_learners,
    "personalisers": vlprompt.list_personalisers,
    "segmenters": vlprompt.list_segmenters,
    "tasks": list_tasks,
}


@pytest.mark.parametrize("kind", [kind.value for kind in Kind])
def test_every_name_has_a_summary(command: Command, kind: str) -> None:
    answer = command("list", kind)
    assert answer.status == 0
    lines = [line.split(maxsplit=1) for line in answer.out.splitlines()]
    assert [line for line in lines if len(line) < 2] == []
    names = [line[0] for line in lines]
    assert len(names) == len(set(names))
    if kind in PUBLIC:
        assert sorted(names) == sorted(PUBLIC[kind]())


def test_a_pattern_picks_names(command: Command) -> None:
    answer = command("list", "configs", "quick*")
    assert [line.split()[0] for line in answer.out.splitlines()] == [
        "quickstart.yaml",
        "quickstart_photos.yaml",
    ]
    assert "no configs match 'x*'" in command("list", "configs", "x*").out


def test_an_unknown_kind_names_all(command: Command) -> None:
    answer = command("list", "lerners")
    assert answer.status == 2
    assert "learners" in answer.err


def test_plug_in_tasks_are_listed(command: Command, toy: str) -> None:
    assert "toy " in command("list", "tasks").out
