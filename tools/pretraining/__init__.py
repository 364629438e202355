"""How the embedded models were trained; nothing here is needed to use them.

A recipe is one file here and one YAML in ``configs/``, whose ``recipe`` names it and whose other keys are its
options.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from vlprompt.core.errors import ConfigError
from vlprompt.core.options import describe_problems
from vlprompt.core.registry import Entry, Registry
from vlprompt.experiments.old_config import read_yaml

__all__ = ["RECIPES", "read_recipe"]

RECIPES: Registry[Any] = Registry("recipe", "pretraining")
"""Functions (options, folder, *, resume, workers) -> path of what they made.

Registered with ``options``, a pydantic model that has a ``name``, and ``ships``, where the package keeps the file.
"""


def read_recipe(cfg: str | Path, overrides: Sequence[str] = ()) -> tuple[Entry[Any], Any]:
    """Return the recipe a configuration file names, and its options.

    Args:
        cfg: A name in ``configs/`` or a path, see :func:`vlprompt.experiments.old_config.read_yaml`.
        overrides: ``dotted.key=value``.

    Raises:
        ConfigError: With every mistake at once.
        UnknownNameError: If there is no such file or recipe.
    """
    raw = read_yaml(cfg, overrides, "pretrain")
    name = raw.pop("recipe", None)
    if name is None:
        raise ConfigError([f"recipe: required, but missing. Known: {', '.join(RECIPES.names())}."], str(cfg))

    entry = RECIPES.get(str(name))
    model: type[BaseModel] = entry.extra["options"]
    try:
        return entry, model.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(describe_problems(error, model), str(cfg)) from error
