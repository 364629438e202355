"""manifest: a data set as the ELEVATER benchmark distributes it, an index file per part over zip archives.

Two kinds of index exist: text, one ``archive.zip@path label[,label...]`` a line, and COCO's JSON.

Reference: microsoft/vision-datasets IRIS_DATA_FORMAT.md and COCO_DATA_FORMAT.md.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from vlprompt.core.errors import DataError
from vlprompt.core.names import clean_classname
from vlprompt.core.pixels import check_value_range
from vlprompt.data.base import ImageDataset, Sample
from vlprompt.data.cards import Card
from vlprompt.data.decoding import Decoding
from vlprompt.data.sources import Request, read_text, sources
from vlprompt.data.sources._layout import absent, dataset_from, parse_options
from vlprompt.data.splits import is_inside
from vlprompt.data.zipped import ZipReader

__all__ = ["build"]

_PLACES = ("elevater", "elevater/classification", "classification", "")
_Entry = tuple[str, tuple[int, ...]]


class _Options(BaseModel):
    """Source options of a card.

    Attributes:
        folder: The data set's folder in the benchmark, with its date.
        index: Index file of each part.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    folder: str
    index: dict[Literal["train", "val", "test"], str]


@sources.register("manifest", summary="ELEVATER's own distribution: index files over zip archives")
def build(request: Request, *, value_range: Sequence[float] | None = None) -> ImageDataset:
    """Build one split of a card's data set.

    Args:
        request: What is asked for.
        value_range: What becomes black and white in images of more than 8 bits; None: declared or measured.

    Raises:
        AbsentError: If it isn't there.
        DataError: If an index or an archive is damaged or incomplete; says where.
    """
    card = request.need_card
    options = parse_options(request, _Options)
    candidates = [Path(parent) / options.folder for parent in _PLACES]
    folder = next((request.root / p for p in candidates if (request.root / p).is_dir()), None)
    if folder is None:
        raise absent(request, [p.as_posix() for p in candidates[:1]])

    if request.split not in options.index:
        parts: dict[str, tuple[Sample, ...]] = dict.fromkeys(options.index, ())
        return dataset_from(request, parts, card.classnames, "", folder)

    index = folder / options.index[request.split]
    if not index.is_file():
        raise DataError(f"{card.name}: the index {index} is missing.")

    reader = ZipReader(folder, Decoding(value_range=check_value_range(value_range, request.name)))
    entries, names = _coco(index) if index.suffix == ".json" else _iris(index, folder / "labels.txt")
    _check_present(card.name, index, reader, entries)
    label_of, order = _labels(card, names)
    samples = tuple(_sample(card, index, e, label_of) for e in entries if e[1])
    _warn_unlabelled(card.name, index, [source for source, numbers in entries if not numbers])
    how = f"the benchmark's {index.name}; {order}"

    return dataset_from(request, {request.split: samples}, card.classnames, how, reader)


def _warn_unlabelled(name: str, index: Path, sources: Sequence[str]) -> None:
    """Say how many images an index lists without a label; nothing can be learned or scored on them."""
    if sources:
        warnings.warn(
            f"{name}: {len(sources)} images of {index.name} have no label and are left out, first {sources[0]}.",
            stacklevel=4,
        )


def _sample(card: Card, index: Path, entry: _Entry, label_of: list[int]) -> Sample:
    source, listed = entry
    numbers = tuple(dict.fromkeys(listed))  # in COCO there is one for each object, and two may be alike
    if max(numbers) >= len(label_of) or (len(numbers) > 1 and not card.multi_label):
        raise DataError(
            f"{index}: {source} has the labels {numbers}; {card.name} has {len(label_of)} classes."
        )
    labels = tuple(label_of[x] for x in numbers)
    return Sample(source, labels if card.multi_label else labels[0])


def _labels(card: Card, names: list[str] | None) -> tuple[list[int], str]:
    """Return the card's label of each number in the index, and how it was found.

    Names that are the card's in another order say it themselves; otherwise numbers are labels, which is how the
    benchmark's own programs pair them with its list of class names.
    """
    wanted = [clean_classname(c).casefold() for c in card.classnames]
    own_names = [clean_classname(n).casefold() for n in names or ()]
    if sorted(own_names) == sorted(wanted):
        return [wanted.index(n) for n in own_names], "classes by its names"
    if own_names and len(own_names) != len(wanted):
        raise DataError(
            f"{card.name}: its list of labels has {len(own_names)} classes, the card {len(wanted)}."
        )
    return list(range(len(wanted))), "classes by number"


def _iris(index: Path, labels: Path) -> tuple[list[_Entry], list[str] | None]:
    entries = []
    for number, line in enumerate(read_text(index).splitlines(), 1):
        if not line.strip():
            continue
        path, _, numbers = line.strip().rpartition(" ")
        try:
            entries.append((path, tuple(int(n) for n in numbers.split(","))))
        except ValueError:
            raise DataError(
                f"{index}, line {number}: expected 'archive.zip@path label', got {line[:80]!r}."
            ) from None
        if not path or not is_inside(path.replace("@", "/")) or min(entries[-1][1]) < 0:
            raise DataError(f"{index}, line {number}: {line[:80]!r} leaves the folder or has no label.")

    names = next((p for p in (labels, labels.with_name("labelmap.txt")) if p.is_file()), None)
    lines = [] if names is None else read_text(names).splitlines()
    return entries, [x.strip() for x in lines if x.strip()] or None


def _coco(index: Path) -> tuple[list[_Entry], list[str] | None]:
    try:
        content = json.loads(read_text(index))
        categories = sorted(content["categories"], key=lambda c: c["id"])
        number_of = {c["id"]: i for i, c in enumerate(categories)}
        labels: dict[Any, list[int]] = {}
        for annotation in content["annotations"]:
            labels.setdefault(annotation["image_id"], []).append(number_of[annotation["category_id"]])
        entries = [
            ("@".join(filter(None, (i.get("zip_file"), i["file_name"]))), tuple(labels.get(i["id"], ())))
            for i in content["images"]
        ]
        names = [str(c["name"]) for c in categories]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{index} is no COCO index: {type(error).__name__} {error}.") from None

    bad = [source for source, _ in entries if not is_inside(source.replace("@", "/"))]
    if bad:
        raise DataError(f"{index}: {bad[0]!r} leaves the folder.")
    return entries, names


def _check_present(name: str, index: Path, reader: ZipReader, entries: list[_Entry]) -> None:
    """Refuse an index whose images are not all there; names the first ones."""
    members: dict[str, frozenset[str]] = {}
    missing = []
    for source, _ in entries:
        archive, _, member = source.partition("@")
        if member and archive not in members:
            members[archive] = reader.members(archive)
        if not (member in members[archive] if member else (reader.root / archive).is_file()):
            missing.append(source)

    if missing:
        raise DataError(
            f"{name}: {len(missing)} of the {len(entries)} images that {index.name} lists are missing, for example "
            f"{', '.join(missing[:3])}."
        )
