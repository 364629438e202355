"""Names of data sets: one list and one grammar, for classification and for segmentation.

A name has one of four forms:

- the name of a card, such as ``oxford_pets`` or ``kvasir_seg``;
- ``scenes/TASK`` or ``scenes/TASK@STYLE``: images that are drawn;
- ``KIND:ARGUMENT``: the user's own files, such as ``folder:PATH`` or ``pairs:PATH``;
- ``NAME-c:KIND:SEVERITY``: another data set with corrupted images, such as ``digits-c:fog:3``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vlprompt.core.errors import DataError, UnknownNameError
from vlprompt.core.paths import user_path
from vlprompt.core.registry import Registry
from vlprompt.data import scenes
from vlprompt.data.cards import Card, card_names, load_card
from vlprompt.data.corruptions import parse_corruption
from vlprompt.data.segmentation.sources import pair_sources
from vlprompt.data.segmentation.sources.scenes import TASKS as MASK_TASKS
from vlprompt.data.sources import sources

__all__ = ["DataName", "Task", "check_name", "default_root", "list_datasets", "parse_name"]

Task = Literal["classification", "segmentation"]

_REGISTRIES: dict[Task, Registry[Any]] = {"classification": sources, "segmentation": pair_sources}
_LOADERS: dict[Task, str] = {
    "classification": "vlprompt.load_dataset",
    "segmentation": "vlprompt.load_segmentation",
}
_OWN_FILES: dict[Task, str] = {
    "classification": "Your own images: folder:PATH, csv:PATH or tar:PATTERN.",
    "segmentation": "Your own images and masks: pairs:PATH, prompts:PATH (with a JSON file of phrases) or "
    "per_class:PATH.",
}


@dataclass(frozen=True)
class DataName:
    """What the name of a data set means.

    Attributes:
        text: The name as the user wrote it.
        task: What its data are for; ``"classification"`` includes several labels per image.
        kind: The source that reads it; the first one of a card.
        argument: What the source is asked for: a drawn task with its style, or a path; empty for a card.
        card: The card, if the name is a card's.
        base: The data set whose images are corrupted, if the name says so.
    """

    text: str
    task: Task
    kind: str
    argument: str = ""
    card: Card | None = None
    base: DataName | None = None

    @property
    def embedded(self) -> bool:
        """Whether its images are drawn or come with the library, so that no file is needed."""
        if self.base is not None:
            return self.base.embedded
        return bool(_REGISTRIES[self.task].get(self.kind).extra.get("embedded"))


def default_root() -> Path:
    """Return the folder of downloaded data sets: ``VLPROMPT_DATA``, or ``~/.cache/vlprompt/data``."""
    return user_path(os.environ.get("VLPROMPT_DATA") or "~/.cache/vlprompt/data")


def list_datasets(task: Task | None = None) -> list[str]:
    """Return the sorted names of all data sets, or only those of a task.

    Styles (``scenes/TASK@STYLE``), corrupted images (``NAME-c:KIND:SEVERITY``) and your own files (``folder:PATH``,
    ``csv:PATH``, ``tar:PATTERN``, ``pairs:PATH``, ``prompts:PATH``, ``per_class:PATH``) come in addition.
    """
    masks = [*card_names("segmentation"), *(f"scenes/{name}" for name in MASK_TASKS)]
    if task == "segmentation":
        return sorted(masks)
    names = [*card_names(), *(f"scenes/{name}" for name in (*scenes.list_tasks(), *MASK_TASKS))]
    if task == "classification":
        return sorted(set(names) - set(masks))
    return sorted(names)


def parse_name(name: str, task: Task | None = None) -> DataName:
    """Return what a name means, without reading any data.

    Args:
        name: The name.
        task: The task that the data must be for; None for any.

    Raises:
        UnknownNameError: If no card, drawn task or kind of files has this name; says the nearest ones.
        DataError: If it is not a name at all, or the data are for the other task; says which function opens them.
    """
    if not isinstance(name, str) or not name:
        raise DataError(f"a data set is named by a string, for example 'scenes/shape'; got {name!r}.")

    parsed = _corrupted_name(name) or _scene_name(name) or _file_name(name) or _card_name(name)

    if parsed is None:
        what = "segmentation data set" if task == "segmentation" else "data set"
        hints = _OWN_FILES.values() if task is None else [_OWN_FILES[task]]
        raise UnknownNameError(what, name, list_datasets(task), " ".join(hints))

    if task is not None and parsed.task != task:
        raise DataError(
            f"{name} is a {parsed.task} data set: open it with {_LOADERS[parsed.task]}({name!r})."
        )
    return parsed


def check_name(name: str, task: Task | None = "classification") -> None:
    """Refuse a name that :func:`parse_name` refuses, with the same errors."""
    parse_name(name, task)


def _corrupted_name(name: str) -> DataName | None:
    """Read ``NAME-c:KIND:SEVERITY``."""
    corruption = parse_corruption(name)
    if corruption is None:
        return None
    base = parse_name(corruption.base, "classification")
    return DataName(name, "classification", "corrupted", name, base=base)


def _scene_name(name: str) -> DataName | None:
    """Read ``scenes/TASK[@STYLE]``; the source checks the style."""
    prefix, slash, argument = name.partition("/")
    if prefix != "scenes" or not slash:
        return None

    drawn_task = argument.partition("@")[0]
    if drawn_task in MASK_TASKS:
        return DataName(name, "segmentation", "scenes", argument)
    if drawn_task in scenes.list_tasks():
        return DataName(name, "classification", "scenes", argument)
    return None


def _file_name(name: str) -> DataName | None:
    """Read ``KIND:ARGUMENT``, where a source of either task is registered with this grammar."""
    kind, colon, argument = name.partition(":")
    if not colon:
        return None
    for task, registry in _REGISTRIES.items():
        if kind in registry and registry.get(kind).extra.get("grammar", "").startswith(f"{kind}:"):
            return DataName(name, task, kind, argument)
    return None


def _card_name(name: str) -> DataName | None:
    if name not in card_names():
        return None
    card = load_card(name)
    task: Task = "segmentation" if card.task == "segmentation" else "classification"
    return DataName(name, task, card.source.kind, card=card)
