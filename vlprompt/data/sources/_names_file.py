"""classnames.txt: what the class folders of a data set are called."""

from __future__ import annotations

import unicodedata
import warnings
from collections.abc import Sequence
from pathlib import Path

from vlprompt.core.errors import DataError
from vlprompt.core.names import clean_classname, listed_names, printable
from vlprompt.data.sources import read_text

__all__ = ["read_names"]


def read_names(root: Path, origins: Sequence[str]) -> tuple[str, ...]:
    """Return class names: those of ``classnames.txt`` where it has them, else cleaned folder names.

    A line is ``folder = class name``, ``folder class name``, or a folder alone, which keeps its name. Lines about other
    folders are left out and counted, if every folder that is there has a line.

    Args:
        root: The data set's folder.
        origins: Class folders, by label.

    Raises:
        DataError: Names the line that is wrong.
    """
    names = {origin: clean_classname(origin) for origin in origins}
    path = root / "classnames.txt"
    if not path.is_file():
        return tuple(names.values())

    folders = {_form(origin): origin for origin in origins}
    line_of: dict[str, int] = {}
    unknown: list[tuple[int, str]] = []

    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        folder, rest = _parse(line, folders)
        if folder is None:
            unknown.append((number, line.strip()))
            continue

        if folder in line_of:
            raise DataError(
                f"{printable(str(path))}, line {number}: the folder {folder!r} is on line {line_of[folder]} already."
            )
        line_of[folder] = number

        name = clean_classname(rest.removeprefix("="))
        if rest.startswith("=") and not name:
            raise DataError(f"{printable(str(path))}, line {number}: no class name behind {line.strip()!r}.")
        names[folder] = name or names[folder]

    if unknown:
        _check_unknown(path, unknown, [origin for origin in origins if origin not in line_of])
    return tuple(names.values())


def _parse(line: str, folders: dict[str, str]) -> tuple[str | None, str]:
    """Return the class folder that a line begins with, None if none does, and the rest of the line."""
    text = _form(line.strip())
    for form in (str, str.casefold):  # capitals count only where they tell two folders apart
        spelled = form(text)
        fits = [
            key
            for key in folders
            if spelled.startswith(form(key)) and text[len(key) : len(key) + 1] in ("", " ", "\t", "=")
        ]
        if fits:
            key = max(fits, key=len)
            return folders[key], text[len(key) :].strip()
    return None, ""


def _check_unknown(path: Path, unknown: list[tuple[int, str]], without: list[str]) -> None:
    """Refuse lines that may be misspelt; of more classes than there are folders, only say how many."""
    number, line = unknown[0]
    if without:
        raise DataError(
            f"{printable(str(path))}, line {number}: no class folder begins {line!r}; folders without a line: "
            f"{listed_names(without, 20)}."
        )
    warnings.warn(
        f"{printable(str(path))}: {len(unknown)} lines are about no folder that is here: left out: "
        f"{listed_names((text for _, text in unknown), 5)}.",
        stacklevel=6,
    )


def _form(text: str) -> str:
    return unicodedata.normalize("NFC", text)
