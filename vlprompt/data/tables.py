"""Tables of foreign programs (CSV, TSV): read strictly, every mistake with its line number.

A quotation mark that is not closed swallows rows, and a comma without quotation marks cuts a text: both are errors.
"""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlprompt.core.errors import DataError, nearest
from vlprompt.core.names import printable
from vlprompt.data.images import EXTENSIONS
from vlprompt.data.splits import is_inside

__all__ = ["Row", "Table", "inside", "read_table"]

# How files of other formats begin.
_OTHER_FORMATS = {
    b"PK\x03\x04": "an Excel workbook or a zip archive; save the workbook as CSV UTF-8, or unpack the archive",
    b"PK\x05\x06": "an empty zip archive",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook; save it as CSV UTF-8",
    b"PAR1": "Parquet; write it as CSV, for example with pandas: read_parquet(...).to_csv(..., index=False)",
    b"ARROW1": "Arrow; write it as CSV",
    b"SQLite format 3": "an SQLite database; write the table as CSV",
    b"\x1f\x8b": "compressed by gzip; unpack it",
    b"BZh": "compressed by bzip2; unpack it",
    b"\xfd7zXZ": "compressed by xz; unpack it",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; unpack it",
    b"7z\xbc\xaf": "a 7z archive; unpack it",
    b"Rar!": "a RAR archive; unpack it",
    b"%PDF": "a PDF document",
    b"\xff\xd8\xff": "a JPEG image; name the folder of the images, or a table of them",
    b"\x89PNG": "a PNG image; name the folder of the images, or a table of them",
}
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        line: The line that it ends on, from 1.
        fields: Its fields without blanks around them, as many as the header has.
    """

    line: int
    fields: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A table's content.

    Attributes:
        path: The file.
        header: Names of the columns, without blanks around them.
        rows: All rows but empty ones.
        delimiter: What separates fields.
        empty: Number of empty rows, which are left out.
    """

    path: Path
    header: tuple[str, ...]
    rows: tuple[Row, ...]
    delimiter: str
    empty: int

    @property
    def facts(self) -> str:
        """What reading it decided, for the record."""
        separator = _DELIMITERS.get(self.delimiter, repr(self.delimiter))
        return f"separated by {separator}" + (f", {self.empty} empty rows left out" if self.empty else "")

    def column(
        self, what: str, names: Sequence[str], option: str = "", *, required: bool = True
    ) -> int | None:
        """Return the position of a column that goes by one of several names; capitals don't count.

        Args:
            what: The column's usual name; where it is there, no other one counts.
            names: Further names that it may have.
            option: The option that names it, for messages.
            required: Whether it has to be there.

        Raises:
            DataError: If it isn't there or several columns could be it.
        """
        where = f"{printable(str(self.path))}, line 1"
        lowered = [name.lower() for name in self.header]
        fits = [i for i, name in enumerate(lowered) if name == what.lower()]
        fits = fits or [i for i, name in enumerate(lowered) if name in names]
        if len(fits) == 1:
            return fits[0]
        choose = f" Say which one: {option}=NAME." if option else ""

        if fits:
            listing = " and ".join(repr(self.header[i]) for i in fits)
            raise DataError(f"{where}: the columns {listing} can both be {what!r}.{choose}")
        if not required:
            return None

        close = nearest(what, self.header)
        hint = (
            f" Did you mean {close[0]!r}? Then pass the column's name{f' ({option})' if option else ''}."
            if close
            else ""
        )
        raise DataError(
            f"{where}: no column {what!r}; the header has {', '.join(self.header) or 'nothing'}.{hint or choose}"
        )


def read_table(path: Path, delimiter: str | None = None) -> Table:
    """Read a table with a header.

    Args:
        path: UTF-8, with or without a byte order mark, or UTF-16 with one, as Excel writes it.
        delimiter: One character; None takes what separates the header: a comma, a semicolon, a tab or a bar.

    Raises:
        DataError: Names the file, and the line that is wrong.
    """
    where = printable(str(path))
    text = _text(path)
    first, _, rest = text.partition("\n")
    if first.strip().lower().startswith("sep=") and len(first.strip()) == 5:  # Excel's own way to say it
        delimiter = delimiter or first.strip()[4]
        text = f"\n{rest}"
    if delimiter is not None and (
        not isinstance(delimiter, str) or len(delimiter) != 1 or delimiter in '"\r\n'
    ):
        raise DataError(f"{where}: delimiter is one character, for example ';'; got {delimiter!r}.")

    separator = delimiter or _sniffed(where, text)
    header: tuple[str, ...] | None = None
    rows = []
    empty = 0

    for line, fields in _records(where, text, separator):
        if not any(fields):
            empty += bool(header)
        elif header is None:
            header = fields
        else:
            rows.append(_checked(where, line, fields, header, separator))

    table = Table(path, header or (), tuple(rows), separator, empty)
    if (delimiter is None and separator != ",") or empty:
        warnings.warn(f"{where}: {table.facts}.", stacklevel=3)
    return table


def inside(table: Path, line: int, path: str) -> str:
    """Return a path of a table relative to the table's folder, with ``/`` and without detours such as ``./``.

    Raises:
        DataError: If it leaves the folder.
    """
    if "://" in path:
        raise DataError(
            f"{printable(str(table))}, line {line}: {path[:200]!r} is an address: nothing is fetched. Download the "
            "images and give their paths."
        )
    slashes = path.replace("\\", "/")
    parts = "/".join(part for part in slashes.split("/") if part not in ("", "."))
    written = f"/{parts}" if slashes.startswith("/") else parts

    for folder in (table.parent.absolute(), table.parent.resolve()):
        written = written.removeprefix(f"{folder.as_posix().rstrip('/')}/")
    if not is_inside(written):
        raise DataError(
            f"{printable(str(table))}, line {line}: the path {path!r} leaves the table's folder. Use paths inside it."
        )
    return written


def _text(path: Path) -> str:
    where = printable(str(path))
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"can't read the table {where}: {error.strerror or error}.") from None

    _refuse_other_formats(where, data)
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            f"{where} is no readable CSV table in UTF-8: line {line} holds the byte {data[error.start]:#04x}. Save it "
            "as UTF-8 (in Excel: CSV UTF-8)."
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _refuse_other_formats(where: str, data: bytes) -> None:
    """Refuse what is plainly no table, by its first bytes."""
    kind = next((kind for start, kind in _OTHER_FORMATS.items() if data.startswith(start)), "")
    if not kind and data[257:262] == b"ustar":
        kind = "a tar archive; read it with tar:PATH, or unpack it"
    if not kind and data.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"["):
        kind = "JSON; write its entries as rows of a CSV table with a header"
    if kind:
        raise DataError(f"{where} is no CSV table but {kind}.")


def _sniffed(where: str, text: str) -> str:
    """Return what separates the header's columns; of several, the error names them."""
    header = next((line for line in text.split("\n") if line.strip()), "")
    outside = "".join(header.split('"')[::2])  # not what stands in quotation marks
    present = [delimiter for delimiter in _DELIMITERS if delimiter in outside]
    if len(present) > 1:
        names = " and ".join(_DELIMITERS[delimiter] for delimiter in present)
        raise DataError(
            f"{where}, line 1: the header holds {names}, so what separates columns is not clear. Pass delimiter=..."
        )
    return present[0] if present else ","


def _records(where: str, text: str, delimiter: str) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yield the line on which a record ends and its fields."""
    lines = text.split("\n")
    null = text.find("\0")
    if null >= 0:  # Python 3.10's reader would say so in words of its own
        line = text.count("\n", 0, null) + 1
        raise DataError(f"{where}, line {line}: there is a null character.")

    reader = csv.reader(
        io.StringIO(text), delimiter=delimiter, skipinitialspace=delimiter != " ", strict=True
    )
    previous = 0
    while True:
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f"{where}, line {previous + 1}: {_reason(str(error))} (it may begin further down, at line "
                f"{reader.line_num}). A quotation mark inside a text is written twice, in quotation marks."
            ) from None
        if fields is None:
            return

        line = reader.line_num
        if line > previous + 1:
            _check_swallowed(where, previous + 1, line, lines, delimiter)
        previous = line
        yield line, tuple(field.strip() for field in fields)


def _check_swallowed(where: str, first: int, last: int, lines: Sequence[str], delimiter: str) -> None:
    """Refuse a record over several lines if one of those looks like a row of its own."""
    for number in range(first + 1, last + 1):
        parts = [part.strip(' "').lower() for part in lines[number - 1].split(delimiter)]
        if len(parts) > 1 and any(part.endswith(EXTENSIONS) for part in parts):
            raise DataError(
                f"{where}, lines {first} to {last} are one row: a quotation mark on line {first} is not closed, or one "
                f"on line {last} is too many. A quotation mark inside a text is written twice, in quotation marks."
            )


def _checked(where: str, line: int, fields: tuple[str, ...], header: tuple[str, ...], delimiter: str) -> Row:
    """Return a row with as many fields as the header; empty ones at the end may be missing or too many."""
    trimmed = fields
    while len(trimmed) > len(header) and not trimmed[-1]:
        trimmed = trimmed[:-1]
    if len(trimmed) > len(header):
        separators = _DELIMITERS.get(delimiter, repr(delimiter))
        raise DataError(
            f"{where}, line {line}: {len(trimmed)} fields, but the header has {len(header)} columns. Texts that hold "
            f"{separators} stand in quotation marks; the first surplus field is {trimmed[len(header)][:60]!r}."
        )
    return Row(line, trimmed + ("",) * (len(header) - len(trimmed)))


def _reason(text: str) -> str:
    """Return what is wrong with quotation marks, or what Python's reader says."""
    if "unexpected end of data" in text:
        return "a quotation mark is not closed"
    if "expected after" in text:
        return "text follows a closing quotation mark"
    return text
