"""folder:PATH, images beside .txt captions; csv:PATH, a table of images and captions."""

from __future__ import annotations

import warnings
from pathlib import Path

from PIL import Image

from vlprompt.core.errors import DataError
from vlprompt.core.paths import user_path
from vlprompt.data.base import hash_strings
from vlprompt.data.captions import CAPTION_SOURCES
from vlprompt.data.decoding import read_image
from vlprompt.data.images import file_stamp
from vlprompt.data.listing import list_images, spelled_on_disk
from vlprompt.data.sources import AbsentError
from vlprompt.data.tables import Row, Table, inside, read_table

__all__ = ["FolderCaptions", "TableCaptions"]

_IMAGE_COLUMNS = ("path", "filepath", "file", "filename", "file_name", "image_path")
_CAPTION_COLUMNS = ("title", "text")


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

    Columns: ``image``, or else ``path``, ``filepath``, ``file``, ``filename``, ``file_name`` or ``image_path``;
    ``caption``, or else ``title`` or ``text``. Files ending in ``.tsv`` are separated by tabs, others by what separates
    the header. Images are relative to the table's folder and stay inside it.

    Args:
        argument: The table.

    Raises:
        DataError: Names the line and column that is wrong.
    """

    def __init__(self, argument: str) -> None:
        table = user_path(argument)
        if not table.is_file():
            raise AbsentError(f"pairs csv:{argument}: there is no file {str(table)!r}.")

        content = read_table(table, "\t" if table.suffix.lower() == ".tsv" else None)
        images = content.column("image", _IMAGE_COLUMNS, required=False)
        captions = content.column("caption", _CAPTION_COLUMNS, required=False)
        if images is None or captions is None:
            raise _no_column(content, "images" if images is None else "captions")

        rows = [_pair(content, row, images, captions) for row in content.rows]
        super().__init__(table.parent, rows)


def _no_column(table: Table, what: str) -> DataError:
    candidates = ("image", *_IMAGE_COLUMNS) if what == "images" else ("caption", *_CAPTION_COLUMNS)
    return DataError(
        f"{table.path}, line 1: no column of {what}; the header has {', '.join(table.header) or 'nothing'}, expected "
        f"one of {', '.join(candidates)}. A table of web addresses must be downloaded first."
    )


def _pair(table: Table, row: Row, images: int, captions: int) -> tuple[str, str]:
    for column in (images, captions):
        if not row.fields[column]:
            raise DataError(f"{table.path}, line {row.line}: column {table.header[column]!r} is empty.")
    path = spelled_on_disk(table.path.parent, inside(table.path, row.line, row.fields[images]))
    return path, " ".join(row.fields[captions].split())


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
