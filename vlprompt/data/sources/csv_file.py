"""csv:PATH: a table with the columns ``path``, ``label`` and, if the splits are given, ``split``.

Paths are relative to the table's folder and stay inside it. Labels are class names. Without a ``split``
column each class is cut 60/20/20, at least one image each, by a hash of the images' paths.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from vlprompt.core.errors import DataError, nearest
from vlprompt.core.names import clean_classname
from vlprompt.core.paths import user_path
from vlprompt.data.base import ImageDataset, Sample
from vlprompt.data.images import FileReader
from vlprompt.data.sources import AbsentError, Request, sources
from vlprompt.data.sources.folder import DEFAULT_TEMPLATES
from vlprompt.data.splits import cut, is_inside, normal_split

__all__ = ["build"]

_SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}


@dataclass(frozen=True)
class _Row:
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
    delimiter: str = ",",
    split_seed: int = 0,
) -> ImageDataset:
    """Build one split of a table.

    Args:
        request: ``argument`` is the CSV file.
        path_column: Column of the images' paths.
        label_column: Column of the class names.
        split_column: Column of the splits; it may be missing.
        delimiter: One character.
        split_seed: Another cut, where the table holds no splits.

    Raises:
        DataError: Names the line and column that is wrong.
    """
    table = user_path(request.argument)
    if not request.argument or not table.is_file():
        raise AbsentError(f"{request.name}: there is no file {str(table)!r}. Write csv:PATH.")

    rows = _rows(table, (path_column, label_column, split_column), delimiter)
    # Labels are numbered by name over all splits, so a split without a class keeps the numbers.
    origins = sorted({r.label for r in rows})
    label_of = {name: label for label, name in enumerate(origins)}

    if any(r.split for r in rows):
        samples = tuple(Sample(r.path, label_of[r.label]) for r in rows if r.split == request.split)
        how = f"column {split_column!r}"
    else:
        groups: dict[int, list[str]] = {}
        for row in rows:
            groups.setdefault(label_of[row.label], []).append(row.path)
        samples = cut(groups, _SHARES, "csv", origins, split_seed)[request.split]
        how = f"cut 60/20/20 per class by path, seed {split_seed}"

    names = tuple(clean_classname(o) for o in origins)
    info = {"source": "csv", "split_source": how, "origins": origins, "fewshot_key": f"csv:{table.name}"}
    reader = FileReader(table.parent)

    return ImageDataset(request.name, request.split, samples, names, DEFAULT_TEMPLATES, reader, info)


def _rows(table: Path, columns: tuple[str, str, str], delimiter: str) -> list[_Row]:
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=delimiter)
            _check_header(table, list(reader.fieldnames or []), columns)
            rows = [_row(table, reader.line_num, raw, columns) for raw in reader]
    except (UnicodeDecodeError, csv.Error, TypeError) as error:
        raise DataError(f"{table} is no readable CSV table in UTF-8: {error}.") from None

    if not rows:
        raise DataError(f"{table}: the table has a header but no rows.")

    _check_together(table, rows, columns)
    return rows


def _check_header(table: Path, header: list[str], columns: tuple[str, str, str]) -> None:
    for column in columns[:2]:
        if column not in header:
            close = nearest(column, header)
            hint = f" Did you mean {close[0]!r}? Then pass the column's name." if close else ""
            raise DataError(
                f"{table}, line 1: no column {column!r}; the header has "
                f"{', '.join(header) or 'nothing'}.{hint}"
            )

    close = [name for name in nearest(columns[2], header) if name not in columns]
    if columns[2] not in header and close:
        raise DataError(
            f"{table}, line 1: column {close[0]!r} looks like {columns[2]!r}. "
            "Rename it, or pass split_column."
        )


def _row(table: Path, line: int, raw: dict[str, str], columns: tuple[str, str, str]) -> _Row:
    values = [(raw.get(c) or "").strip() for c in columns]
    for column, value in zip(columns[:2], values, strict=False):
        if not value:
            raise DataError(f"{table}, line {line}: column {column!r} is empty.")

    path = values[0].replace("\\", "/")
    folder = table.parent.resolve()
    if not is_inside(path) or not (folder / path).resolve().is_relative_to(folder):
        raise DataError(
            f"{table}, line {line}: the path {values[0]!r} leaves the table's folder. Use paths inside it."
        )

    split = normal_split(values[2]) if values[2] else None
    if values[2] and split is None:
        raise DataError(
            f"{table}, line {line}: column {columns[2]!r} is {values[2]!r}; use train, val or test."
        )
    return _Row(line, path, values[1], split)


def _check_together(table: Path, rows: list[_Row], columns: tuple[str, str, str]) -> None:
    seen: dict[str, int] = {}
    for row in rows:
        if row.path in seen:
            raise DataError(
                f"{table}, line {row.line}: the image {row.path!r} is on line {seen[row.path]} already."
            )
        seen[row.path] = row.line

    without = [row for row in rows if not row.split]
    if without and len(without) < len(rows):
        raise DataError(
            f"{table}, line {without[0].line}: column {columns[2]!r} is empty, but other rows have a split."
        )
