"""csv:PATH: a table with the columns ``path``, ``label`` and, if the splits are given, ``split``.

Paths are relative to the table's folder, or absolute inside it. Labels are class names. Without a ``split`` column
each class is cut 60/20/20, at least one image each, by a hash of the images' paths; where only val is missing, it is a
fifth of each class of train. Other usual names of the columns, and what separates them, are recognised and recorded.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlprompt.core.errors import DataError, nearest
from vlprompt.core.names import clean_classname, printable
from vlprompt.core.pixels import check_value_range
from vlprompt.data.base import ImageDataset, Sample
from vlprompt.data.decoding import MAX_PIXELS, Decoding
from vlprompt.data.images import FileReader
from vlprompt.data.listing import LINKS, Links, spelled_on_disk
from vlprompt.data.sources import AbsentError, Request, local_path, sources
from vlprompt.data.sources.folder import DEFAULT_TEMPLATES, check_max_pixels
from vlprompt.data.splits import cut_validation, cut_whole, normal_split
from vlprompt.data.tables import Row, Table, inside, read_table

__all__ = ["build"]

_PATHS = (
    "image",
    "filename",
    "file_name",
    "file",
    "filepath",
    "file_path",
    "image_path",
    "img",
    "img_path",
    "image_name",
)
_LABELS = ("class", "category", "classname", "class_name", "target", "species")
_SPLITS = ("set", "subset", "partition", "dataset_split")


@dataclass(frozen=True)
class _Entry:
    line: int
    path: str
    label: str
    split: str | None


@sources.register("csv", summary="a table path,label[,split]: csv:PATH", grammar="csv:PATH")
def build(
    request: Request,
    *,
    path_column: str = "path",
    label_column: str = "label",
    split_column: str = "split",
    delimiter: str | None = None,
    split_seed: int = 0,
    links: Links = "follow",
    max_pixels: int = MAX_PIXELS,
    value_range: Sequence[float] | None = None,
) -> ImageDataset:
    """Build one split of a table.

    Args:
        request: ``argument`` is the CSV file.
        path_column: Column of the images' paths; as it is written here, or by a usual name (image, file_name ...).
        label_column: Column of the class names; also by a usual name (class, category ...).
        split_column: Column of the splits; it may be missing.
        delimiter: One character; None takes what separates the header.
        split_seed: Another cut, where the table holds no splits.
        links: ``"forbid"`` refuses images that are symbolic links.
        max_pixels: Largest width x height of an image, up to 178,956,970.
        value_range: What becomes black and white in images of more than 8 bits; None: declared or measured.

    Raises:
        DataError: Names the line and column that is wrong.
    """
    path = local_path(request)
    if not request.argument or not path.is_file():
        raise AbsentError(
            f"{printable(request.name)}: there is no file {printable(str(path))!r}. Write csv:PATH."
        )
    if links not in LINKS:
        raise DataError(f"{request.name}: links is 'follow' or 'forbid'; got {links!r}.")

    table = read_table(path, delimiter)
    entries = _entries(table, (path_column, label_column, split_column), links)

    # Labels are numbered by name over all splits, so a split without a class keeps the numbers.
    origins = sorted({entry.label for entry in entries})
    samples, how, cut_off = _samples(request, entries, origins, split_column, split_seed)

    names = tuple(clean_classname(o) for o in origins)
    info: dict[str, Any] = {
        "source": "csv",
        "split_source": how,
        "origins": origins,
        "fewshot_key": f"csv:{path.name}",
    }
    info["table"] = table.facts
    if cut_off:
        info["cut_for_validation"] = cut_off
    limits = check_value_range(value_range, request.name)
    reader = FileReader(path.parent, Decoding(check_max_pixels(max_pixels, request.name), limits))

    return ImageDataset(request.name, request.split, samples, names, DEFAULT_TEMPLATES, reader, info)


def _samples(
    request: Request, entries: Sequence[_Entry], origins: list[str], split_column: str, seed: int
) -> tuple[tuple[Sample, ...], str, list[int]]:
    """Return the samples of a split, where they come from, and how many of train's images became val's."""
    label_of = {name: label for label, name in enumerate(origins)}
    has_splits = any(entry.split for entry in entries)
    wanted = [entry for entry in entries if request.split == "all" or entry.split == request.split]

    if request.split == "all":
        return _listed(entries, label_of), "everything in the table", []
    if not has_splits:
        parts = cut_whole(_grouped(entries, label_of), "csv", origins, seed, request.validation)
        how = "60/20/20" if request.validation else "80/20, without validation,"
        return parts[request.split], f"cut {how} per class by path, seed {seed}", []

    splits = {entry.split for entry in entries}
    if request.split == "test" or "val" in splits or "train" not in splits:
        return _listed(wanted, label_of), f"column {split_column!r}", []

    train = [entry for entry in entries if entry.split == "train"]
    parts = cut_validation(_grouped(train, label_of), "csv", origins, seed, request.validation)
    count = len(parts["val"])
    how = f"column {split_column!r}; val is 20 % of train per class, {count} of its {len(train)} images, seed {seed}"
    return parts[request.split], how, [count, len(train)] if count else []


def _listed(entries: Sequence[_Entry], label_of: dict[str, int]) -> tuple[Sample, ...]:
    return tuple(Sample(entry.path, label_of[entry.label]) for entry in entries)


def _grouped(entries: Sequence[_Entry], label_of: dict[str, int]) -> dict[int, list[str]]:
    groups: dict[int, list[str]] = {}
    for entry in entries:
        groups.setdefault(label_of[entry.label], []).append(entry.path)
    return groups


def _entries(table: Table, names: tuple[str, str, str], links: Links) -> list[_Entry]:
    """Return what the rows say. Raises DataError for what is wrong with one of them, or with two together."""
    path_column = table.column(names[0], _PATHS, "path_column")
    label_column = table.column(names[1], _LABELS, "label_column")
    split_column = table.column(names[2], _SPLITS, "split_column", required=False)
    assert path_column is not None
    assert label_column is not None
    if split_column is None:
        _check_misspelt(table, names)
    if not table.rows:
        raise DataError(f"{printable(str(table.path))}: the table has a header but no rows.")

    columns = (path_column, label_column, split_column)
    entries = [_entry(table, row, columns, links) for row in table.rows]
    _check_together(table, entries, split_column)
    return entries


def _check_misspelt(table: Table, names: tuple[str, str, str]) -> None:
    close = [name for name in nearest(names[2], table.header) if name not in names]
    if close:
        raise DataError(
            f"{printable(str(table.path))}, line 1: column {close[0]!r} looks like {names[2]!r}. "
            "Rename it, or pass split_column."
        )


def _entry(table: Table, row: Row, columns: tuple[int, int, int | None], links: Links) -> _Entry:
    where = f"{printable(str(table.path))}, line {row.line}"
    for column in columns[:2]:
        if not row.fields[column]:
            raise DataError(f"{where}: column {table.header[column]!r} is empty.")

    path = spelled_on_disk(table.path.parent, inside(table.path, row.line, row.fields[columns[0]]))
    folder = table.path.parent.resolve()
    if links == "forbid" and (folder / path).exists() and (folder / path).resolve() != folder / path:
        raise DataError(
            f"{where}: {path!r} is a symbolic link or lies behind one, and links='forbid'. Copy the file there."
        )

    value = "" if columns[2] is None else row.fields[columns[2]]
    split = normal_split(value) if value else None
    if value and split is None:
        name = table.header[columns[2]]  # type: ignore[index]
        raise DataError(f"{where}: column {name!r} is {value!r}; use train, val or test.")
    return _Entry(row.line, path, unicodedata.normalize("NFC", row.fields[columns[1]]), split)


def _check_together(table: Table, entries: Sequence[_Entry], split_column: int | None) -> None:
    """Refuse an image on two rows, rows without a split among others, and a class that only the test rows have."""
    where = printable(str(table.path))
    seen: dict[str, _Entry] = {}
    for entry in entries:
        first = seen.setdefault(unicodedata.normalize("NFC", entry.path), entry)
        if first is not entry:
            raise DataError(
                f"{where}, line {entry.line}: the image {entry.path!r} is on line {first.line} already"
                f"{_difference(first, entry)}."
            )

    without = [entry for entry in entries if not entry.split]
    if without and len(without) < len(entries) and split_column is not None:
        raise DataError(
            f"{where}, line {without[0].line}: column {table.header[split_column]!r} is empty, but other rows have a "
            "split."
        )

    trained = {entry.label for entry in entries if entry.split == "train"}
    if trained:
        strange = [entry for entry in entries if entry.split and entry.label not in trained]
        if strange:
            close = nearest(strange[0].label, trained, 1)
            hint = f" Is it {close[0]!r}?" if close else ""
            raise DataError(
                f"{where}, line {strange[0].line}: the class {strange[0].label!r} has no row in train ({len(strange)} "
                f"rows of such classes).{hint}"
            )


def _difference(first: _Entry, second: _Entry) -> str:
    """Return in what two rows of one image differ."""
    if first.label != second.label:
        return f", there with the label {first.label!r}, here with {second.label!r}"
    if first.split != second.split:
        return f", there in {first.split}, here in {second.split}"
    return ""
