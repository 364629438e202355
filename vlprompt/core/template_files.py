"""Files of templates: one sentence a line, read by every command that takes templates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlprompt.core.errors import DataError
from vlprompt.core.files import write_text
from vlprompt.core.names import check_templates
from vlprompt.core.paths import user_path

__all__ = ["FILE", "listed_templates", "read_templates", "write_templates"]

FILE = "file:"
"""Before the path of a file, where a configuration takes templates."""


def read_templates(path: str | Path) -> tuple[str, ...]:
    """Return the templates of a text file: a sentence with one ``{}`` on each line; lines with ``#`` are comments.

    Raises:
        DataError: If the file is missing, no text in UTF-8, has no template, or a line is none; names the line.
    """
    file = user_path(path)
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except FileNotFoundError:
        raise DataError(f"there is no file of templates {str(file)!r}.") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{file} is no readable text in UTF-8: {error}.") from None

    templates: list[str] = []
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        try:
            templates += check_templates(text)
        except DataError as error:
            raise DataError(f"{file}, line {number}: {error}") from None

    if not templates:
        raise DataError(f"{file} holds no template. Write one sentence with {{}} on each line.")
    return tuple(templates)


def write_templates(path: str | Path, templates: Sequence[str], comments: Sequence[str] = ()) -> Path:
    """Write what :func:`read_templates` reads, comments first; return the path.

    Raises:
        DataError: If a template is none, or holds the end of a line.
        CheckpointError: If the file can't be written.
    """
    file = user_path(path)
    for template in check_templates(templates):
        if len(template.splitlines()) != 1 or template.strip().startswith("#"):
            raise DataError(f"a file of templates has one on each line; got {template[:120]!r}.")

    lines = [*(f"# {comment}" for comment in comments), *templates]
    write_text(file, "\n".join(lines) + "\n")
    return file


def listed_templates(value: Any) -> Any:
    """Return ``templates`` of a configuration with ``file:PATH`` replaced by what the file holds.

    A run's record then has the sentences, and does not change with the file.

    Raises:
        ValueError: For other text, and where :func:`read_templates` refuses the file.
    """
    if not isinstance(value, str):
        return value
    if not value.startswith(FILE):
        raise ValueError(f"templates are a list of sentences, or {FILE}PATH; got {value[:120]!r}.")
    return list(read_templates(value.removeprefix(FILE)))
