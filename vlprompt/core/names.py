"""Class names and templates as text towers read them, and what is refused of them; names of files in messages."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vlprompt.core.errors import DataError

__all__ = [
    "check_classnames",
    "check_templates",
    "check_text",
    "checked_names",
    "class_key",
    "clean_classname",
    "listed_names",
    "match_classes",
    "printable",
]

# What the tokenizers of CLIP's family make equal before they look at a word (ftfy's repairs).
_SAME = {
    **{code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)},  # full width
    0x3000: " ",
    **dict.fromkeys(map(ord, "\u2018\u2019\u201a\u201b\u02bc"), "'"),
    **dict.fromkeys(map(ord, "\u201c\u201d\u201e\u201f"), '"'),
    **{0xFB00: "ff", 0xFB01: "fi", 0xFB02: "fl", 0xFB03: "ffi", 0xFB04: "ffl"},
    **dict.fromkeys((0xAD, 0x200B, 0x2060, 0xFEFF)),  # invisible
}


def clean_classname(name: str) -> str:
    """Return a class name as a text tower should read it: underscores are spaces, single spaces, no ends, NFC."""
    return " ".join(unicodedata.normalize("NFC", name).replace("_", " ").split())


def class_key(name: str) -> str:
    """Return a string that is equal for class names which a text tower can't tell apart.

    Case, underscores, spaces, Unicode's composed and decomposed forms, full width, curly quotation marks, ligatures
    and HTML entities are what tokenizers of CLIP's family make equal.
    """
    text = html.unescape(html.unescape(unicodedata.normalize("NFC", name)))
    return clean_classname(text.translate(_SAME)).casefold()


def printable(name: str) -> str:
    """Return the name of a file or class on one line: control characters and bytes that are no UTF-8 are escaped."""
    escaped = name.encode("utf-8", "surrogateescape" if _is_escaped(name) else "backslashreplace")
    text = escaped.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() or c == " " else c.encode("unicode_escape").decode() for c in text)


def listed_names(names: Iterable[str], most: int = 10) -> str:
    """Return the first names, quoted, and how many more there are."""
    listed = list(names)
    text = ", ".join(repr(printable(str(name))) for name in listed[:most])
    return f"{text} and {len(listed) - most} more" if len(listed) > most else text


def check_text(name: Any, where: str) -> str:
    """Return a class name that is text.

    Raises:
        DataError: If it is a number or a truth value, as YAML reads ``7`` and ``no`` without quotation marks, or holds
            bytes that are no text.
    """
    if not isinstance(name, str):
        kind = (
            "a truth value"
            if isinstance(name, bool)
            else "a number"
            if isinstance(name, (int, float))
            else ""
        )
        what = f"{name!r}, {kind}" if kind else f"{type(name).__name__} {name!r}"
        hint = " YAML reads yes, no, on, off and numbers so: put the name in quotation marks." if kind else ""
        raise DataError(f"{where}: a class name is text; got {what}.{hint}")

    if any(0xD800 <= ord(character) <= 0xDFFF for character in name):
        raise DataError(
            f"{where}: the class name {printable(name)!r} is not UTF-8, so no text tower can read it. Rename its "
            "folder, or write it in UTF-8."
        )
    return name


def checked_names(value: Any) -> Any:
    """Return ``classnames`` of a configuration as they are: None, a list of texts, or old name to new name.

    Raises:
        ValueError: For one text, and for names that YAML reads as numbers or truth values; says what to write.
    """
    if isinstance(value, str):
        raise ValueError(
            f"class names are a list, for example [cat, dog], or old name to new name; got {value!r}."
        )
    names = (
        [*value, *value.values()] if isinstance(value, Mapping) else value if isinstance(value, list) else []
    )
    for name in names:
        check_text(name, "class names")
    return value


def check_classnames(
    names: Sequence[str], where: str, origins: Sequence[str] | None = None
) -> tuple[str, ...]:
    """Return cleaned class names; refuse empty ones, and those that a text tower can't tell apart.

    Args:
        names: One per class.
        where: What they belong to, for the message.
        origins: What each name was made from (a folder, a line), for the message; default: the names.

    Raises:
        DataError: If it is no list of texts, or names are empty or mean the same (see :func:`class_key`); names the
            classes and what to do.
    """
    if isinstance(names, (str, bytes)) or not isinstance(names, Iterable) or isinstance(names, Mapping):
        raise DataError(
            f"{where}: class names are a list, one for each class, for example ['cat', 'dog']; got "
            f"{type(names).__name__} {str(names)[:60]!r}."
        )

    listed = list(names)
    cleaned = tuple(clean_classname(check_text(name, where)) for name in listed)
    origins = listed if origins is None else list(origins)
    seen: dict[str, int] = {}

    for index, name in enumerate(cleaned):
        if not name:
            raise DataError(
                f"{where}: the class from {origins[index]!r} (number {index}) has an empty name. Give it one."
            )
        first = seen.setdefault(class_key(name), index)
        if first != index:
            raise DataError(
                f"{where}: two classes are called {name!r}: {origins[first]!r} and {origins[index]!r}. "
                "Rename one, for example with classnames={...}."
            )

    return cleaned


def match_classes(wanted: Sequence[str], known: Sequence[str]) -> list[int | None]:
    """Return for every wanted class name its position among the known ones; None where there is none.

    Names match if a text tower can't tell them apart: case and Unicode's forms don't count.
    """
    position = {class_key(name): index for index, name in enumerate(known)}
    return [position.get(class_key(name)) for name in wanted]


def check_templates(templates: str | Sequence[str]) -> tuple[str, ...]:
    """Return templates as a tuple.

    Raises:
        DataError: If there is none, or one has not exactly one ``{}`` and no other brace.
    """
    sentences = (templates,) if isinstance(templates, str) else templates
    if not isinstance(sentences, tuple):  # descriptions are tuples of a kind of their own, and stay so
        sentences = tuple(sentences)
    if not sentences:
        raise DataError("at least one template is needed, for example 'a photo of a {}.'.")

    for template in sentences:
        if "{}" not in template or set(template.replace("{}", "", 1)) & {"{", "}"}:
            raise DataError(f"a template has exactly one {{}} for the class name, got {template[:120]!r}.")

    return sentences


def _is_escaped(name: str) -> bool:
    """Return whether all surrogates of a name stand for single bytes, as Python reads foreign file names."""
    return all(not 0xD800 <= ord(c) <= 0xDFFF or 0xDC80 <= ord(c) <= 0xDCFF for c in name)
