"""The ``learner:`` section of a configuration: a name, the method's own options, and what is put around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlprompt.core.errors import ConfigError, UnknownNameError
from vlprompt.core.options import check_options, options_model
from vlprompt.learners import LEARNERS
from vlprompt.learners.plugins import PLUGINS, check_plugins

__all__ = ["learner_arguments", "learner_problems"]

_WITH = "with"


def learner_arguments(section: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Return what :func:`vlprompt.create_learner` takes beside the name, the backbone and the classes.

    Args:
        section: Checked by :func:`learner_problems`.
        seed: Of the run, for a learner and for plug-ins whose options say none.
    """
    own = {key: value for key, value in section.items() if key not in ("name", _WITH)}
    arguments = _seeded(LEARNERS.get(str(section.get("name", "coop"))).target, own, seed)

    plugins = []
    for row in section.get(_WITH) or ():
        options = {"name": row} if isinstance(row, str) else dict(row)
        plugins.append(_seeded(PLUGINS.get(options["name"]).target, options, seed))
    return {**arguments, "plugins": plugins} if plugins else arguments


def learner_problems(section: Any) -> list[str]:
    """Return what is wrong with a section: all at once, in sentences."""
    if not isinstance(section, Mapping):
        return []
    if "name" not in section:
        return ["learner.name: required, but missing."] if section else []

    problems: list[str] = []
    options = {key: value for key, value in section.items() if key not in ("name", _WITH)}
    try:
        check_options(LEARNERS.get(str(section["name"])).target, options, "learner")
    except UnknownNameError as error:
        problems.append(f"learner.name: {error}")
    except ConfigError as error:
        problems += [f"learner.{problem}" for problem in error.problems]

    try:
        check_plugins(section.get(_WITH) or (), "learner")
    except ConfigError as error:
        problems += [f"learner.{problem}" for problem in error.problems]
    return problems


def _seeded(target: type, options: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Return options with the run's seed, where there is such an option and nobody set it."""
    takes_seed = "seed" in options_model(target).model_fields
    return {**({"seed": seed} if takes_seed else {}), **options}
