"""Test-time adaptation: one file per method, discovered, never listed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlprompt.adaptation.base import Adapter
from vlprompt.adaptation.predictions import Predictions
from vlprompt.backbones import Backbone
from vlprompt.core.errors import ConfigError
from vlprompt.core.names import check_classnames
from vlprompt.core.options import check_options, check_type
from vlprompt.core.registry import Registry
from vlprompt.learners import Learner
from vlprompt.learners.base import DEFAULT_TEMPLATES

__all__ = ["ADAPTERS", "Adapter", "Predictions", "create_adapter", "list_adapters"]

ADAPTERS: Registry[type[Adapter]] = Registry("adapter", "vlprompt.adaptation")
"""Every adapter by name, with its paper and what it needs."""


def create_adapter(
    name: str,
    backbone_or_learner: Backbone | Learner,
    classnames: Sequence[str] | None = None,
    templates: Sequence[str] = DEFAULT_TEMPLATES,
    **options: Any,
) -> Adapter:
    """Build an adapter: a classifier that adapts itself to every image, or to the stream of images.

    Args:
        name: See :func:`list_adapters`.
        backbone_or_learner: Where adaptation starts from: a backbone (zero-shot; see :meth:`Adapter.start`), or
            a learner whose prompts were trained. Neither is ever changed.
        classnames: C distinct names; for a learner None means its own, and others are named with its prompts.
        templates: Hand-written sentences with one ``{}``, for methods that start from zero-shot weights.
        **options: The method's own, see its class.

    Raises:
        UnknownNameError: For an unknown adapter.
        ConfigError: For options the method doesn't have or values it doesn't take, all at once.
        BackboneError: If the method can't work on this backbone; says why.
        DataError: For class names that are missing, empty, repeated or too long, or a learner that has nothing
            this method could adapt.
    """
    entry = ADAPTERS.get(name)
    source = f"adapter {name!r}"
    made_by = "vlprompt.create_backbone(...) or vlprompt.create_learner(...)"
    check_type(backbone_or_learner, (Backbone, Learner), "a backbone or a learner", made_by)
    checked = check_options(entry.target, options, source=source)

    if isinstance(backbone_or_learner, Learner):
        learner = backbone_or_learner
        if checked.get("init") is not None:
            raise ConfigError(["init: a learner brings its own prompts; leave it out."], source)
        # The same names would only cost a pass through the text tower.
        if classnames is not None and check_classnames(classnames, source) != learner.classnames:
            learner = learner.with_classes(classnames)
    else:
        if classnames is None:
            raise ConfigError(["classnames: required, but missing (only a learner brings its own)."], source)
        learner = entry.target.start(backbone_or_learner, classnames, templates, checked)

    adapter = entry.target(learner, **checked)
    adapter.method = name
    adapter.options = checked
    return adapter


def list_adapters() -> list[str]:
    """Return the sorted names of all adapters."""
    return ADAPTERS.names()
