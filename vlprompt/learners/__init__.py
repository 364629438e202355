"""Prompt learners: one file per method, discovered, never listed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlprompt.backbones import Backbone
from vlprompt.core.options import check_options, check_type
from vlprompt.core.registry import Registry
from vlprompt.learners.base import DEFAULT_TEMPLATES, Learner
from vlprompt.learners.plugins import check_plugins

__all__ = ["LEARNERS", "Learner", "create_learner", "list_learners"]

LEARNERS: Registry[type[Learner]] = Registry("learner", "vlprompt.learners")
"""Every learner by name, with its paper and what it needs."""


def create_learner(
    name: str,
    backbone: Backbone,
    classnames: Sequence[str],
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    *,
    plugins: Sequence[str | Mapping[str, Any]] = (),
    **options: Any,
) -> Learner:
    """Build a learner on a backbone.

    Args:
        name: See :func:`list_learners`.
        backbone: See :func:`vlprompt.create_backbone`.
        classnames: C distinct names.
        templates: Hand-written sentences with one ``{}``, for what a method takes from zero-shot
            classification.
        plugins: What is put around the learner: for each, its name (see :func:`list_plugins`) and options. Their order
            does not count.
        **options: The method's own, see its class.

    Raises:
        UnknownNameError: For an unknown learner.
        ConfigError: For options the method doesn't have or values it doesn't take, all at once.
        BackboneError: If the method can't work on this backbone; says why.
        DataError: For class names that are empty, repeated or too long, something else in the backbone's place, or a
            plug-in that can't stand on the learner; says why.
    """
    entry = LEARNERS.get(name)
    checked = check_options(entry.target, options, source=f"learner {name!r}")
    around = check_plugins(plugins, source=f"learner {name!r}")
    check_type(backbone, Backbone, "a backbone", "vlprompt.create_backbone(...)")

    learner = entry.target(backbone, classnames, templates, **checked)
    learner.method = name
    for plugin, settings in around:
        learner = plugin(learner, **settings)
    return learner.to(backbone.device)


def list_learners() -> list[str]:
    """Return the sorted names of all learners."""
    return LEARNERS.names()
