"""Tasks by name: every package of the library, or of a plug-in, that has a module ``experiment`` with a ``build``."""

from __future__ import annotations

import ast
import importlib
import shlex
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol

from vlprompt.core.errors import ConfigError, UnknownNameError
from vlprompt.core.options import check_switches
from vlprompt.experiments.config import compose, config_path, list_configs
from vlprompt.experiments.experiment import Experiment
from vlprompt.experiments.runner import RunOutcome, run_experiment
from vlprompt.experiments.schedule import Progress
from vlprompt.training.callbacks import Callback

__all__ = ["Build", "describe_tasks", "list_tasks", "read_experiment", "run"]

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


def describe_tasks() -> dict[str, str]:
    """Return the name of every task and a line about it: the first of its package's docstring."""
    return {name: _summary(name) for name in list_tasks()}


def run(
    cfg: str | Path,
    overrides: Sequence[str] = (),
    on: str = "serial",
    restart: bool = False,
    resume: bool = False,
    *,
    join: bool = False,
    attach: bool = False,
    progress: Progress | None = None,
    callbacks: Sequence[Callback] = (),
) -> RunOutcome:
    """Run the experiment that a configuration describes; ``vlprompt run`` does the same.

    A run that was stopped continues, and one that is finished is returned as it is.

    Args:
        cfg: A path, or the name of a shipped file, for example ``"coop_tiny.yaml"``.
        overrides: ``dotted.key=value`` strings, for example ``"train.lr=0.01"``.
        on: Where cells run: ``"serial"``, ``"processes:N"``, ``"ray"`` or ``"slurm"``, with their options.
        restart: Move an earlier run of the same configuration and data aside, and begin anew.
        resume: Fail if there is nothing to continue.
        join: Work beside other commands that write the same run, here or on other machines.
        attach: Wait for jobs that an earlier command left in a queue, and write what they come to; ``on`` is not used.
        progress: Called with (name of the run, cells done, cells).
        callbacks: Take part in every training (see :class:`vlprompt.training.callbacks.Callback`). In other
            processes there are copies of them; only ``on_cell`` is called on those that were passed.

    Raises:
        ConfigError: With every mistake in the configuration at once, or if a tracker isn't installed.
        UnknownNameError: If there is no such file or executor.
        CheckpointError: If another process is writing this run, ``resume`` finds nothing, which says what differs, or
            ``attach`` finds no jobs.
        VLPromptError: If no cell finished, for one reason.
    """
    check_switches(restart=restart, resume=resume, join=join, attach=attach)
    experiment = read_experiment(cfg, overrides)
    return run_experiment(
        experiment,
        on=on,
        restart=restart,
        resume=resume,
        join=join,
        attach=attach,
        command=_command(cfg, overrides),
        progress=progress,
        callbacks=callbacks,
    )


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


def _command(cfg: str | Path, overrides: Sequence[str]) -> str:
    """Return the command that repeats a run, the same wherever and however it was started, and wherever it writes."""
    path = config_path(cfg)
    shipped = list_configs().get(path.name)
    name = path.name if shipped is not None and shipped.samefile(path) else str(cfg)
    repeated = [override for override in overrides if not override.startswith("output=")]
    return f"vlprompt run {shlex.join([name, *repeated])}"


def _summary(task: str) -> str:
    """Return the first line of a task's docstring, without importing what the task needs."""
    plug_ins = _plug_ins()
    if task in plug_ins:
        return f"plug-in {plug_ins[task].value}"
    path = Path(__file__).resolve().parent.parent / task / "__init__.py"
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]


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
