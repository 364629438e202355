"""folder:PATH, images beside .txt captions; csv:PATH, a table of images and captions."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path

from PIL import Image

from vlprompt.core.errors import DataError
from vlprompt.core.paths import user_path
from vlprompt.data.base import hash_strings
from vlprompt.data.captions import CAPTION_SOURCES
from vlprompt.data.images import file_stamp, read_image
from vlprompt.data.listing import list_images
from vlprompt.data.sources import AbsentError
from vlprompt.data.splits import is_inside

__all__ = ["FolderCaptions", "TableCaptions"]

_IMAGE_COLUMNS = ("image", "path", "filepath", "file", "filename")
_CAPTION_COLUMNS = ("caption", "title", "text")


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
        root = user_path(argument)
        if not root.is_dir():
            raise AbsentError(f"pairs folder:{argument}: there is no folder {str(root)!r}.")

        images = list_images(root, root)
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

    Columns: ``image``, ``path``, ``filepath``, ``file`` or ``filename``; ``caption``, ``title`` or ``text``. Files
    ending in ``.tsv`` are separated by tabs. Images are relative to the table's folder and stay inside it.

    Args:
        argument: The table.

    Raises:
        DataError: Names the line and column that is wrong.
    """

    def __init__(self, argument: str) -> None:
        table = user_path(argument)
        if not table.is_file():
            raise AbsentError(f"pairs csv:{argument}: there is no file {str(table)!r}.")

        delimiter = "\t" if table.suffix.lower() == ".tsv" else ","
        try:
            with table.open(encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file, delimiter=delimiter)
                columns = _columns(table, list(reader.fieldnames or []))
                rows = [_row(table, reader.line_num, raw, columns) for raw in reader]
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{table} is no readable table in UTF-8: {error}.") from None

        super().__init__(table.parent, rows)


def _columns(table: Path, header: list[str]) -> tuple[str, str]:
    lowered = {name.strip().lower(): name for name in header}
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


def _row(table: Path, line: int, raw: dict[str, str], columns: tuple[str, str]) -> tuple[str, str]:
    path, caption = ((raw.get(column) or "").strip() for column in columns)
    for column, value in zip(columns, (path, caption), strict=True):
        if not value:
            raise DataError(f"{table}, line {line}: column {column!r} is empty.")

    path = path.replace("\\", "/")
    folder = table.parent.resolve()
    if not is_inside(path) or not (folder / path).resolve().is_relative_to(folder):
        raise DataError(
            f"{table}, line {line}: the path {path!r} leaves the table's folder. Use paths inside it."
        )
    return path, caption


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
