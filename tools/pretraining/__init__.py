"""How the embedded models were trained; nothing here is needed to use them.

A recipe is one file here and one YAML in ``configs/pretraining/``, whose ``recipe`` names it and whose other keys are
its options.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from vlprompt.core.errors import ConfigError
from vlprompt.core.options import describe_problems
from vlprompt.core.registry import Entry, Registry
from vlprompt.experiments.config import compose, merge, parse_overrides, resolve

__all__ = ["RECIPES", "read_recipe"]

TASK = "pretraining"
RECIPES: Registry[Any] = Registry("recipe", "pretraining")
"""Functions (options, folder, *, resume, workers) -> path of what they made.

Registered with ``options``, a pydantic model that has a ``name``, and ``ships``, where the package keeps the file.
"""


def read_recipe(cfg: str | Path, overrides: Sequence[str] = ()) -> tuple[Entry[Any], Any]:
    """Return the recipe a configuration file names, and its options.

    Args:
        cfg: A path, or the name of a file in ``configs/pretraining/``.
        overrides: ``dotted.key=value``.

    Raises:
        ConfigError: With every mistake at once.
        UnknownNameError: If there is no such file or recipe.
    """
    raw = compose(cfg)
    task = raw.pop("task", TASK)
    if task != TASK:
        raise ConfigError(
            [f"task: this file is of the task {task!r}; its command is vlprompt run {cfg}."], str(cfg)
        )
    name = raw.pop("recipe", None)
    if name is None:
        raise ConfigError([f"recipe: required, but missing. Known: {', '.join(RECIPES.names())}."], str(cfg))

    entry = RECIPES.get(str(name))
    model: type[BaseModel] = entry.extra["options"]
    raw = resolve(merge(raw, parse_overrides(overrides, model)), str(cfg))
    try:
        return entry, model.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(describe_problems(error, model), str(cfg)) from error
