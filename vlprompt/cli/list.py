"""``vlprompt list``: the names that can be used, each with a line about it."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from fnmatch import fnmatch
from pathlib import Path
from pkgutil import resolve_name
from typing import Annotated

import typer

__all__ = ["Kind", "command", "print_names"]

_REGISTRIES = {
    "adapters": "vlprompt.adaptation:ADAPTERS",
    "corruptions": "vlprompt.data.corruptions:CORRUPTIONS",
    "detectors": "vlprompt.detection:DETECTORS",
    "executors": "vlprompt.experiments.executors:EXECUTORS",
    "generators": "vlprompt.diffusion:GENERATORS",
    "learners": "vlprompt.learners:LEARNERS",
    "personalisers": "vlprompt.generation:PERSONALISERS",
    "regulators": "vlprompt.meta.regulators:REGULATORS",
    "scanners": "vlprompt.security.scanners:SCANNERS",
    "segmenters": "vlprompt.segmentation:SEGMENTERS",
    "strategies": "vlprompt.segmentation.strategies:STRATEGIES",
    "triggers": "vlprompt.data.triggers:TRIGGERS",
}


class Kind(str, Enum):
    """What can be listed."""

    LEARNERS = "learners"
    BACKBONES = "backbones"
    DATASETS = "datasets"
    CONFIGS = "configs"
    TASKS = "tasks"
    EXECUTORS = "executors"
    ADAPTERS = "adapters"
    SEGMENTERS = "segmenters"
    STRATEGIES = "strategies"
    DETECTORS = "detectors"
    PERSONALISERS = "personalisers"
    GENERATORS = "generators"
    SCANNERS = "scanners"
    TRIGGERS = "triggers"
    CORRUPTIONS = "corruptions"
    REGULATORS = "regulators"


def command(
    kind: Annotated[Kind, typer.Argument(help="What to list.")],
    pattern: Annotated[str, typer.Argument(help="Only names that match, for example '*tiny*'.")] = "*",
) -> None:
    """Print the names of learners, data sets, configurations and more, each with a line about it."""
    print_names(kind.value, pattern)


def print_names(kind: str, pattern: str = "*") -> None:
    """Print the names of one kind that match a shell pattern, a line each."""
    summaries = {name: text for name, text in _summaries(kind).items() if fnmatch(name, pattern)}
    if not summaries:
        print(f"no {kind} match {pattern!r}")
        return

    width = max(map(len, summaries))
    for name, text in summaries.items():
        print(f"{name:{width}}  {text}".rstrip())


def _summaries(kind: str) -> dict[str, str]:
    """Return name to summary of everything of one kind, sorted as it should be read."""
    if kind in _REGISTRIES:
        return {
            entry.name: _with_paper(entry.summary, entry.paper) for entry in resolve_name(_REGISTRIES[kind])
        }
    return _OTHERS[kind]()


def _with_paper(summary: str, paper: str) -> str:
    return f"{summary} ({paper})" if paper else summary


def _backbones() -> dict[str, str]:
    from vlprompt.backbones import BACKBONES, list_backbones

    summaries = {
        entry.name: entry.summary for entry in BACKBONES
    }  # embedded ones first: they need no download
    for name in list_backbones():
        summaries.setdefault(name, "open_clip's architecture")
    return summaries


def _datasets() -> dict[str, str]:
    from vlprompt.data import list_datasets, load_dataset
    from vlprompt.data.cards import card_titles

    titles = card_titles()
    masks = set(list_datasets("segmentation"))
    summaries = {}

    for name in list_datasets():
        if name in titles:
            summaries[name] = titles[name]
        elif name in masks:
            summaries[name] = "scenes drawn on the fly, with masks of phrases (segmentation)"
        else:
            classnames = load_dataset(name, "test").classnames
            examples = ", ".join(classnames[:3])
            summaries[name] = (
                f"scenes drawn on the fly, {len(classnames)} classes: {examples} ... (classification)"
            )

    return summaries


def _configs() -> dict[str, str]:
    from vlprompt.experiments.config import list_configs

    return {name: _first_sentence(path) for name, path in list_configs().items()}


def _first_sentence(path: Path) -> str:
    """Return the first sentence of the comment at the top of a file."""
    words = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#") or line.startswith("#   "):  # indented lines show the command
            break
        words.append(line.lstrip("# "))
    return " ".join(words).partition(". ")[0].removesuffix(".")


def _tasks() -> dict[str, str]:
    from vlprompt.experiments.tasks import describe_tasks

    return describe_tasks()


_OTHERS: dict[str, Callable[[], dict[str, str]]] = {
    "backbones": _backbones,
    "configs": _configs,
    "datasets": _datasets,
    "tasks": _tasks,
}
