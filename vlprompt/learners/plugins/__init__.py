"""Plug-ins: what is put around any learner, one file each, discovered, never listed.

``create_learner("coop", ..., plugins=[{"name": "dept", "weight": 0.7}])`` in Python; in a configuration
``learner: {name: coop, with: [{name: dept, weight: 0.7}]}``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from vlprompt.core.errors import ConfigError, UnknownNameError
from vlprompt.core.options import check_options
from vlprompt.core.registry import Registry
from vlprompt.learners.plugins.base import Plugin

__all__ = ["PLUGINS", "Plugin", "check_plugins", "list_plugins"]

PLUGINS: Registry[type[Plugin]] = Registry("plugin", "vlprompt.learners.plugins")
"""Every plug-in by name."""


def check_plugins(asked: Any, source: str) -> list[tuple[type[Plugin], dict[str, Any]]]:
    """Return the plug-ins that are asked for, with checked options, in the order in which they are put around.

    Args:
        asked: A list of mappings: ``name`` and the plug-in's own options; or a name alone.
        source: What asks, for messages.

    Raises:
        ConfigError: With every mistake at once: unknown names and keys, bad values, a plug-in that is named twice.
    """
    if isinstance(asked, str | Mapping) or not isinstance(asked, Iterable):
        raise ConfigError([f"with: a list of plug-ins, for example [{{name: dept}}]; got {asked!r}."], source)

    problems: list[str] = []
    chosen: dict[str, tuple[type[Plugin], dict[str, Any]]] = {}
    for number, row in enumerate(asked):
        where = f"with.{number}"
        content = {"name": row} if isinstance(row, str) else row
        if not isinstance(content, Mapping) or not isinstance(content.get("name"), str):
            problems.append(
                f"{where}: name and options of a plug-in, for example {{name: dept}}; got {row!r}."
            )
            continue

        name = content["name"]
        try:
            target = PLUGINS.get(name).target
            options = {str(key): value for key, value in content.items() if key != "name"}
            checked = check_options(target, options, source)
        except UnknownNameError as error:
            problems.append(f"{where}.name: {error}")
        except ConfigError as error:
            problems += [f"{where}.{problem}" for problem in error.problems]
        else:
            if name in chosen:
                problems.append(f"{where}.name: {name} is named twice; a learner has each plug-in once.")
            chosen[name] = (target, checked)

    if problems:
        raise ConfigError(problems, source)
    return sorted(chosen.values(), key=lambda pair: pair[0].rank)


def list_plugins() -> list[str]:
    """Return the sorted names of all plug-ins."""
    return PLUGINS.names()
