"""What a user's own folder or table holds, before anything trains: splits, classes, what is left out, what is twice."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

from vlprompt.core.errors import DataError
from vlprompt.core.names import listed_names, printable
from vlprompt.core.paths import user_path
from vlprompt.data.base import ImageDataset
from vlprompt.data.catalog import open_split
from vlprompt.data.images import verify
from vlprompt.data.listing import list_folder
from vlprompt.data.sources import AbsentError
from vlprompt.data.splits import SPLITS

__all__ = ["Overview", "look_at", "name_of_path"]

_SHOWN = 10  # examples of a line


@dataclass
class Overview:
    """What :func:`look_at` saw.

    Attributes:
        name: ``folder:PATH``, ``csv:PATH`` or ``tar:PATTERN``.
        lines: What there is, a line each.
        problems: What a user should mend, a sentence each.
    """

    name: str
    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def name_of_path(text: str) -> str | None:
    """Return the name of a data set that a path means; None if there is nothing at the path."""
    if text.startswith(("folder:", "csv:", "tar:")):
        return text
    try:
        if os.path.isdir(text):
            return f"folder:{text}"
        return f"csv:{text}" if os.path.isfile(text) else None
    except ValueError:  # a null character
        return None


def look_at(name: str) -> Overview:
    """Open all splits of a folder or table, decode every image, and compare the images of the splits.

    Args:
        name: ``folder:PATH``, ``csv:PATH`` or ``tar:PATTERN``.

    Raises:
        AbsentError: If there is no such folder or table.
        DataError: If no split can be opened.
    """
    overview = Overview(name)
    splits = _opened(overview)
    first = next(iter(splits.values()))
    overview.lines.append(f"{len(first.classnames)} classes: {listed_names(first.classnames, 20)}")
    overview.lines.append(f"splits: {first.info['split_source']}")
    if "table" in first.info:
        overview.lines.append(f"table: {first.info['table']}")

    for split, data in splits.items():
        _describe(overview, split, data)
    _compare(overview, splits)
    if name.startswith("folder:"):
        overview.lines += _left_out(user_path(name.removeprefix("folder:")))
    return overview


def _opened(overview: Overview) -> dict[str, ImageDataset]:
    """Return the splits that can be opened; note the others, and what opening them warns of."""
    splits: dict[str, ImageDataset] = {}
    errors: dict[str, DataError] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for split in SPLITS:
            try:
                splits[split] = open_split(overview.name, split)
            except AbsentError:
                raise
            except DataError as error:
                errors[split] = error

    if not splits:
        raise errors[SPLITS[0]]
    overview.problems += [f"{split}: {error}" for split, error in errors.items()]
    overview.lines += dict.fromkeys(str(warning.message) for warning in caught)
    return splits


def _describe(overview: Overview, split: str, data: ImageDataset) -> None:
    """Add the sizes of a split, and the images of it that can't be read."""
    counts = Counter(data.classnames[label] for label in data.labels)
    sizes = ", ".join(f"{printable(name)} {counts[name]}" for name in data.classnames[:20])
    more = f" and {len(data.classnames) - 20} more classes" if len(data.classnames) > 20 else ""
    overview.lines.append(f"{split}: {len(data)} images ({sizes}{more})")

    absent = [name for name in data.classnames if not counts[name]]
    if absent:
        overview.lines.append(f"{split}: no image of {listed_names(absent, _SHOWN)}")

    report = verify(data)
    overview.lines += [f"{split}: {note} ({count} images)" for note, count in report.notes]
    if report.bad:
        overview.problems.append(f"{split}: {report}.")


def _compare(overview: Overview, splits: dict[str, ImageDataset]) -> None:
    """Add images that occur twice, by their bytes: in two splits, or with two labels."""
    entries_of: dict[str, dict[str, list[tuple[str, str]]]] = {}
    for split, data in splits.items():
        for key, source, label in _keyed(data):
            entries_of.setdefault(key, {}).setdefault(split, []).append((source, data.classnames[label]))

    for one, other in combinations(splits, 2):
        shared = [parts for parts in entries_of.values() if one in parts and other in parts]
        if shared:
            example = f"{shared[0][one][0][0]} = {shared[0][other][0][0]}"
            overview.problems.append(f"{one} and {other} share {len(shared)} images, for example {example}.")

    contradictory = []
    for parts in entries_of.values():
        entries = [entry for part in parts.values() for entry in part]
        if len({label for _, label in entries}) > 1:
            contradictory.append(entries)

    if contradictory:
        example = ", ".join(f"{source} is {label!r}" for source, label in contradictory[0][:_SHOWN])
        overview.problems.append(
            f"{len(contradictory)} images occur with several labels, for example {example}."
        )


def _keyed(data: ImageDataset) -> Iterator[tuple[str, str, int]]:
    """Yield the content key, the name and the label of every image that can be read."""
    for index, sample in enumerate(data.samples):
        try:
            yield data.key(index), printable(str(sample.source)), sample.classes[0]
        except DataError:  # reported as unreadable already
            continue


def _left_out(root: Path) -> Iterator[str]:
    """Yield a line for every reason why entries of a folder are left out."""
    skipped = list_folder(root, root).skipped
    for reason, count in Counter(entry.reason for entry in skipped).items():
        names = listed_names((entry.name for entry in skipped if entry.reason == reason), 5)
        yield f"left out: {count}, {reason}: {names}"
