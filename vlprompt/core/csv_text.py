"""Tables as CSV text that spreadsheets open without running anything in it."""

from __future__ import annotations

import csv
import io
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["csv_line", "csv_text", "is_one_line", "safe_cell"]

_FORMULA = ("=", "+", "-", "@")
_UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")  # controls, lone surrogates, separators of lines and paragraphs


def is_one_line(text: str) -> bool:
    """Return whether a text has neither control characters nor line breaks of any kind."""
    return not any(unicodedata.category(character) in ("Cc", "Zl", "Zp") for character in text)


def safe_cell(value: Any) -> Any:
    r"""Return a value as a CSV cell should hold it; numbers stay as they are.

    A text that a spreadsheet would run as a formula (it begins with ``=``, ``+``, ``-`` or ``@``, blanks before it
    left aside) gets an apostrophe in front, as OWASP advises. Control characters, line breaks and bytes that are no
    UTF-8 are written as escapes (``\n``, ``\xff``), so that a row is a line.
    """
    if not isinstance(value, str):
        return value

    escaped = "".join(map(_escaped, value))
    return f"'{escaped}" if value.lstrip().startswith(_FORMULA) else escaped


def csv_line(values: Iterable[Any]) -> str:
    """Return one row as CSV text, with its line break; cells as of :func:`safe_cell`."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerow([safe_cell(value) for value in values])
    return out.getvalue()


def csv_text(columns: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    """Return a table as CSV text with a header; cells as of :func:`safe_cell`."""
    return csv_line(columns) + "".join(map(csv_line, rows))


def _escaped(character: str) -> str:
    if unicodedata.category(character) not in _UNPRINTABLE:
        return character
    if "\udc80" <= character <= "\udcff":  # a byte of a file name that is no UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()
