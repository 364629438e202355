"""folder:PATH, images beside .txt captions; csv:PATH, a table of images and captions."""

from __future__ import annotations

import contextlib
import csv
import os
import warnings
from pathlib import Path

from PIL import Image

from vlprompt.core.errors import DataError
from vlprompt.data.base import hash_strings
from vlprompt.data.captions import CAPTION_SOURCES
from vlprompt.data.images import EXTENSIONS, file_stamp, read_image
from vlprompt.data.listing import list_images
from vlprompt.data.sources import AbsentError
from vlprompt.data.splits import is_inside

__all__ = ["FolderCaptions", "TableCaptions"]

_IMAGE_COLUMNS = ("image", "path", "filepath", "file", "filename", "file_name")
_CAPTION_COLUMNS = ("caption", "title", "text")
_DELIMITERS = (",", ";", "\t")
_MOST_LINES = 20  # of one caption


class _Files:
    """Images below one folder, each with a caption."""

    def __init__(self, root: Path, pairs: list[tuple[str, str]]) -> None:
        self.root = root
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def caption(self, index: int) -> str:
        """See :meth:`CaptionSource.caption`."""
        return self.pairs[index][1]

    def image(self, index: int) -> Image.Image:
        """See :meth:`CaptionSource.image`."""
        return read_image(self.root / self.pairs[index][0])

    def identity(self) -> str:
        """See :meth:`CaptionSource.identity`: names, sizes of the files and captions."""
        facts = ((name, str(_size(self.root / name)), caption) for name, caption in self.pairs)
        return hash_strings("\t".join(fact) for fact in facts)

    def stamp(self, index: int) -> str:
        """See :meth:`CaptionSource.stamp`."""
        return file_stamp(self.root / self.pairs[index][0])


@CAPTION_SOURCES.register("folder", summary="images beside captions in .txt files", grammar="folder:PATH")
class FolderCaptions(_Files):
    """``PATH/**/name.jpg`` with ``name.txt`` beside it; images without captions are left out and counted.

    Args:
        argument: The folder.

    Raises:
        DataError: If it doesn't exist, or a caption is no UTF-8 text.
    """

    def __init__(self, argument: str) -> None:
        root = Path(argument).expanduser()
        if not root.is_dir():
            raise AbsentError(f"pairs folder:{argument}: there is no folder {str(root)!r}.")

        images = list_images(root, root)
        _refuse_shared_texts(root, images)
        texts = {name: _read(root / name) for name in images}
        missing = sum(not text for text in texts.values())
        if missing:
            warnings.warn(
                f"{root}: {missing} of {len(images)} images have no caption (a .txt file of the same name): "
                "left out.",
                stacklevel=3,
            )

        super().__init__(root, [(name, text) for name, text in texts.items() if text])


@CAPTION_SOURCES.register("csv", summary="a table of images and captions (CSV, TSV)", grammar="csv:PATH")
class TableCaptions(_Files):
    """A table with a header, a column of images and one of captions, such as CC3M's after its download.

    Columns: ``image``, ``path``, ``filepath``, ``file``, ``filename`` or ``file_name``; ``caption``, ``title`` or
    ``text``. Fields are separated by commas, semicolons or tabs, whichever the header has. Images are relative to the
    table's folder, or absolute, and stay inside it. Empty rows don't count.

    Args:
        argument: The table.

    Raises:
        DataError: Names the line and column that is wrong.
    """

    def __init__(self, argument: str) -> None:
        table = Path(argument).expanduser()
        if not table.is_file():
            raise AbsentError(f"pairs csv:{argument}: there is no file {str(table)!r}.")

        rows: list[tuple[str, str]] = []
        line = 1
        try:
            with table.open(encoding="utf-8-sig", newline="") as file:
                delimiter = _delimiter(file.readline(), table)
                file.seek(0)
                reader = csv.reader(file, delimiter=delimiter, strict=True, skipinitialspace=True)
                header = next(reader, [])
                columns = _columns(table, header)

                for fields in reader:
                    line = reader.line_num
                    if any(field.strip() for field in fields):
                        rows.append(_row(table, line, fields, header, columns))
        except csv.Error as error:
            raise DataError(
                f"{table}, behind line {line}: {error}. A quotation mark that opens a field must be closed, and be "
                "doubled inside it."
            ) from None
        except (UnicodeDecodeError, OSError) as error:
            raise DataError(f"{table} is no readable table in UTF-8: {error}.") from None

        super().__init__(table.parent, rows)


def _delimiter(header: str, table: Path) -> str:
    """Return what separates fields: the one sign that the header has, or the usual one of the file's ending."""
    counts = {delimiter: header.count(delimiter) for delimiter in _DELIMITERS}
    usual = "\t" if table.suffix.lower() == ".tsv" else ","
    return usual if counts[usual] else max(_DELIMITERS, key=lambda delimiter: counts[delimiter])


def _columns(table: Path, header: list[str]) -> tuple[int, int]:
    lowered = {name.strip().lower(): number for number, name in enumerate(header)}
    chosen = []
    for what, candidates in (("images", _IMAGE_COLUMNS), ("captions", _CAPTION_COLUMNS)):
        column = next((lowered[name] for name in candidates if name in lowered), None)
        if column is None:
            raise DataError(
                f"{table}, line 1: no column of {what}; the header has {', '.join(header) or 'nothing'}, expected one "
                f"of {', '.join(candidates)}. A table of web addresses must be downloaded first."
            )
        chosen.append(column)

    return chosen[0], chosen[1]


def _row(
    table: Path, line: int, fields: list[str], header: list[str], columns: tuple[int, int]
) -> tuple[str, str]:
    if len(fields) != len(header):
        raise DataError(
            f"{table}, line {line}: {len(fields)} fields, the header has {len(header)}. A caption with the separating "
            "sign in it stands in quotation marks."
        )
    path, caption = (fields[column].strip() for column in columns)
    for column, value in zip(columns, (path, caption), strict=True):
        if not value:
            raise DataError(f"{table}, line {line}: column {header[column].strip()!r} is empty.")
        # A quotation mark that is not closed swallows the rows up to the next one.
        lines = value.splitlines()
        if len(lines) > _MOST_LINES or any(ending in text for text in lines[1:] for ending in EXTENSIONS):
            raise DataError(
                f"{table}, line {line}: the column {header[column].strip()!r} runs over several lines, from "
                f"{lines[0][:40]!r} to {lines[-1][:40]!r}: a quotation mark is not closed."
            )

    path = path.replace("\\", "/")
    folder = table.parent.resolve()
    if Path(path).is_absolute():
        with contextlib.suppress(ValueError):
            path = Path(os.path.normpath(path)).relative_to(folder).as_posix()
    if not is_inside(path) or not (folder / path).resolve().is_relative_to(folder):
        raise DataError(
            f"{table}, line {line}: the path {path!r} leaves the table's folder. Use paths inside it."
        )
    return path, caption


def _refuse_shared_texts(root: Path, images: list[str]) -> None:
    """Refuse a.jpg beside a.png: nothing says whose caption a.txt is."""
    first_of: dict[str, str] = {}
    for name in images:
        first = first_of.setdefault(name.rpartition(".")[0], name)
        if first != name and (root / name).with_suffix(".txt").is_file():
            raise DataError(
                f"{root}: {first} and {name} would share one caption. Rename or remove one of them."
            )


def _read(image: Path) -> str:
    text = image.with_suffix(".txt")
    if not text.is_file():
        return ""
    try:
        return " ".join(text.read_text(encoding="utf-8-sig").split())
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(f"{text} is no readable text in UTF-8: {error}.") from None


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1
