"""Class names and templates as text towers read them, and what is refused of them."""

from __future__ import annotations

from collections.abc import Sequence

from vlprompt.core.errors import DataError

__all__ = ["check_classnames", "check_templates", "clean_classname"]


def clean_classname(name: str) -> str:
    """Return a class name as a text tower should read it: underscores are spaces, single spaces, no ends."""
    return " ".join(name.replace("_", " ").split())


def check_classnames(
    names: Sequence[str], where: str, origins: Sequence[str] | None = None
) -> tuple[str, ...]:
    """Return cleaned class names; refuse empty ones, and those equal but for case, underscores and spaces.

    Args:
        names: One per class.
        where: What they belong to, for the message.
        origins: What each name was made from (a folder, a line), for the message; default: the names.

    Raises:
        DataError: Names the classes and what to do.
    """
    origins = list(map(str, names)) if origins is None else list(origins)
    cleaned = tuple(clean_classname(str(name)) for name in names)
    seen: dict[str, int] = {}

    for index, name in enumerate(cleaned):
        if not name:
            raise DataError(
                f"{where}: the class from {origins[index]!r} (number {index}) has an empty name. Give it one."
            )
        first = seen.setdefault(name.casefold(), index)
        if first != index:
            raise DataError(
                f"{where}: two classes are called {name!r}: {origins[first]!r} and {origins[index]!r}. "
                "Rename one, for example with classnames={...}."
            )

    return cleaned


def check_templates(templates: str | Sequence[str]) -> tuple[str, ...]:
    """Return templates as a tuple.

    Raises:
        DataError: If there is none, or one has not exactly one ``{}`` and no other brace.
    """
    sentences = (templates,) if isinstance(templates, str) else tuple(templates)
    if not sentences:
        raise DataError("at least one template is needed, for example 'a photo of a {}.'.")

    for template in sentences:
        if "{}" not in template or set(template.replace("{}", "", 1)) & {"{", "}"}:
            raise DataError(f"a template has exactly one {{}} for the class name, got {template[:120]!r}.")

    return sentences
