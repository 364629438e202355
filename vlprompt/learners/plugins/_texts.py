"""On which learners a plug-in can stand that reads what the text tower says of each class."""

from __future__ import annotations

from vlprompt.learners.plugins.base import Plugin

__all__ = ["require_texts"]


def require_texts(plugin: Plugin) -> None:
    """Refuse a learner that has no learned text vector per class.

    Raises:
        DataError: Says why.
    """
    inner = plugin.inner
    if inner.solves or inner.prepares:
        plugin.refuse("it finds its parameters from all samples at once, not step by step.")
    if not inner.learns_texts:
        plugin.refuse(
            "it learns nothing in the text tower that names a class by one vector. Use a learner of prompts (coop, "
            "kgcoop, maple, promptsrc ...)."
        )
