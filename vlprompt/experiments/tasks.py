"""Tasks by name: every package of the library, or of a plug-in, that has a module ``experiment`` with a ``build``."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

from vlprompt.core.errors import ConfigError, UnknownNameError
from vlprompt.experiments.config import compose
from vlprompt.experiments.experiment import Experiment

__all__ = ["Build", "list_tasks", "read_experiment"]

_PRETRAINING = "pretraining"  # of embedded weights; its programs are in the repository, not in the package


class Build(Protocol):
    """What a task's module ``experiment`` must have under the name ``build``."""

    def __call__(self, raw: Mapping[str, Any], overrides: Sequence[str], source: str) -> Experiment:
        """Return the experiment that a configuration describes.

        Args:
            raw: Content of the file, bases merged (see :func:`vlprompt.experiments.config.compose`).
            overrides: ``dotted.key=value`` strings.
            source: The file's name, for messages.

        Raises:
            ConfigError: With every mistake at once.
        """


def list_tasks() -> list[str]:
    """Return the sorted names of all tasks."""
    return sorted({*_own_tasks(), *_plug_ins()})


def read_experiment(cfg: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read a configuration and return its experiment, ready for :func:`vlprompt.experiments.runner.run_experiment`.

    Args:
        cfg: A path, or the name of a shipped file.
        overrides: ``dotted.key=value`` strings.

    Raises:
        ConfigError: With every mistake at once; if the file names no task, or one that is no experiment.
        UnknownNameError: If there is no such file.
    """
    raw = compose(cfg)
    tasks = list_tasks()

    task = raw.get("task")
    if task == _PRETRAINING:
        raise ConfigError([f"task: {cfg} makes embedded weights; its command is python tools/pretrain.py --cfg {cfg}, "
                           "in the repository."], str(cfg))  # fmt: skip
    if task is None:
        raise ConfigError([f"task: required, but missing. Known: {', '.join(tasks)}."], str(cfg))
    if task not in tasks:
        raise ConfigError([f"task: {UnknownNameError('task', str(task), tasks)}"], str(cfg))
    return _builder(str(task))(raw, overrides, str(cfg))


def _builder(task: str) -> Build:
    plug_ins = _plug_ins()
    if task in plug_ins:
        builder: Build = plug_ins[task].load()
        return builder

    module = importlib.import_module(f"vlprompt.{task}.experiment")
    function: Build = module.build
    return function


def _own_tasks() -> list[str]:
    package = Path(__file__).resolve().parent.parent
    return [
        path.parent.name for path in package.glob("*/experiment.py") if path.parent != Path(__file__).parent
    ]


def _plug_ins() -> dict[str, Any]:
    """Return the entry points of other packages: group ``vlprompt.tasks``, each a function like :class:`Build`."""
    return {point.name: point for point in entry_points(group="vlprompt.tasks")}
