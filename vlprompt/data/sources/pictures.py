"""torchvision: data sets that torchvision downloads and checks, read from their files.

The published few-shot split is used when its file lies in the data set's folder. Otherwise the pictures are
cut by class folder, or official lists are followed; such a cut is stored as ``split_local_*.json``, and
results say which it was.
"""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import Literal

import torchvision
from pydantic import Field, model_validator

from vlprompt.data.base import ImageDataset, Sample
from vlprompt.data.cards import Card
from vlprompt.data.listing import list_pictures
from vlprompt.data.sources import Request, sources
from vlprompt.data.sources.split_json import (
    Layout,
    check_present,
    dataset_from,
    find_folder,
    not_found,
    parse_options,
    published_split,
)
from vlprompt.data.splits import SPLITS, cut, read_split, write_split
from vlprompt.errors import DataError, UnknownNameError

__all__ = ["build", "download_set"]

_SPLIT_SOURCES = ("auto", "published", "resplit", "lists")
_Parts = dict[str, tuple[Sample, ...]]


class _Options(Layout):
    """Source options of a card.

    Attributes:
        torchvision_class: Class in ``torchvision.datasets`` that downloads it.
        class_folders: Folder of each class in ``images``, by label, for cutting.
        lists: Official list files by part; ``trainval`` is cut by ``shares``.
        label_column: Column of the 1-based label in a list; None takes the picture's folder for the class.
        suffix: What is added to a list's first column to get the file name.
        shares: Part to share, per class; for class folders, or for ``trainval``.
    """

    torchvision_class: str
    class_folders: tuple[str, ...] = ()
    lists: dict[Literal["train", "val", "trainval", "test"], str] = Field(default_factory=dict)
    label_column: int | None = None
    suffix: str = ""
    shares: dict[str, float] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _cuttable(self) -> _Options:
        needed = (
            {"val", "train"} if "trainval" in self.lists else set(SPLITS) if self.class_folders else set()
        )
        if needed and set(self.shares) != needed:
            raise ValueError(f"shares must be given for {sorted(needed)}, got {sorted(self.shares)}")
        return self


@sources.register("torchvision", summary="downloaded by torchvision, cut as the few-shot protocol does")
def build(
    request: Request,
    *,
    download: bool = False,
    split_source: Literal["auto", "published", "resplit", "lists"] = "auto",
) -> ImageDataset:
    """Build one split of a card's data set.

    Args:
        request: What is asked for.
        download: Fetch it, if it isn't there.
        split_source: ``"published"`` insists on the protocol's split file, ``"resplit"`` cuts class folders,
            ``"lists"`` follows official lists; ``"auto"`` takes the first of these that the data set has.

    Raises:
        DataError: If it isn't there, is incomplete or can't be fetched; says what to do.
    """
    card = request.need_card
    options: _Options = parse_options(card, _Options)
    if split_source not in _SPLIT_SOURCES:
        raise UnknownNameError("split_source", str(split_source), _SPLIT_SOURCES)
    if download and find_folder(request.root, options) is None:
        download_set(card, options, request.root)
    folder = find_folder(request.root, options)
    if folder is None:
        size = f"{card.download_mb} MB" if card.download_mb else "size unknown"
        raise not_found(request, options, f"Pass download=True to fetch it ({size}). ")
    parts, names, how = _split(request, options, folder, split_source)
    return dataset_from(request, folder / options.images, parts[request.split], names, how)


def download_set(card: Card, options: Layout, root: Path) -> None:
    """Let torchvision fetch, check and unpack a data set, and move it into place once it is whole.

    Raises:
        DataError: If that fails; one sentence, and how to do it by hand.
    """
    staging = root / f".download-{card.name}-{os.getpid()}"
    fetch = getattr(torchvision.datasets, card.source.options["torchvision_class"])
    try:
        staging.mkdir(parents=True, exist_ok=True)
        fetch(str(staging), download=True)
        for folder in options.folders:
            if (staging / folder / options.images).is_dir():
                _move_in(staging / Path(folder).parts[0], root, last=Path(options.images).parts[0])
                return
        raise DataError(
            f"{card.name}: torchvision unpacked it to an unknown place; expected {options.folders}."
        )
    except (
        OSError,
        RuntimeError,
    ) as error:  # URLError, HTTPError and timeouts are OSErrors, a bad checksum RuntimeError
        reason = " ".join(str(error).split()).rstrip(".")
        raise DataError(
            f"{card.name} could not be fetched into {root}: {reason}. Try again later, or by hand: "
            f"{card.by_hand.strip()} (ROOT is {root}; archives: {', '.join(card.urls)})"
        ) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _move_in(fetched: Path, root: Path, last: str) -> None:
    """Move what was fetched into the root, beside a split file that may be there, the image folder last.

    A data set counts as present once its image folder exists, so a kill in between leaves it absent, not
    damaged.
    """
    target = root / fetched.name
    target.mkdir(exist_ok=True)
    for path in sorted(fetched.iterdir(), key=lambda p: p.name == last):
        if path.name.endswith((".zip", ".tar.gz", ".tgz")):
            continue
        if (target / path.name).exists():
            raise OSError(f"{target / path.name} is in the way; move it elsewhere")
        os.replace(path, target / path.name)


def _split(
    request: Request, options: _Options, folder: Path, wanted: str
) -> tuple[_Parts, tuple[str, ...], str]:
    card, images = request.need_card, folder / options.images
    if wanted in ("auto", "published"):
        published = published_split(request, options, folder)
        if published is not None:
            return published
        if wanted == "published":
            raise DataError(
                f"{card.name}: {folder / str(card.splits.file)} is missing. Get it from {card.splits.url}."
            )
    if options.class_folders and wanted in ("auto", "resplit"):
        return _stored(card, options, folder, images)
    if options.lists and wanted in ("auto", "lists"):
        if "trainval" in options.lists:
            return _stored(card, options, folder, images)
        parts = {s: _read_list(card, options, folder, options.lists[s]) for s in SPLITS}  # type: ignore[index]
        check_present(card.name, "the official lists", images, parts)
        return parts, card.classnames, f"official lists {', '.join(options.lists.values())}"
    raise DataError(f"{card.name} has no split_source={wanted!r}.")


def _stored(card: Card, options: _Options, folder: Path, images: Path) -> tuple[_Parts, tuple[str, ...], str]:
    """Return our own cut: as it was stored, or made now and stored."""
    path = folder / f"split_local_{card.name}.json"
    if not path.is_file():
        parts = (
            _cut_folders(card, options, images)
            if options.class_folders
            else _cut_lists(card, options, folder)
        )
        if sum(map(len, parts.values())) != sum(card.splits.sizes.values()):
            warnings.warn(
                f"{card.name}: {sum(map(len, parts.values()))} pictures in {images}, "
                f"{sum(card.splits.sizes.values())} expected: is it whole?",
                stacklevel=6,
            )
        try:
            write_split(path, parts, card.classnames)
        except OSError as error:  # a read-only folder costs the record only: the cut is the same every time
            warnings.warn(f"{path} could not be written ({error.strerror or error}).", stacklevel=6)
            return parts, card.classnames, f"local cut, not stored: {card.splits.otherwise}"
    stored = read_split(path)
    check_present(card.name, path.name, images, stored.parts)
    return stored.parts, stored.classnames, f"{path.name} sha256 {stored.sha256}: {card.splits.otherwise}"


def _cut_folders(card: Card, options: _Options, images: Path) -> _Parts:
    if missing := [f for f in options.class_folders if not (images / f).is_dir()]:
        raise DataError(f"{card.name}: class folders are missing in {images}: {', '.join(missing[:5])}.")
    groups = {label: list_pictures(images / f, images) for label, f in enumerate(options.class_folders)}
    return cut(groups, options.shares, card.name, card.classnames)


def _cut_lists(card: Card, options: _Options, folder: Path) -> _Parts:
    groups: dict[int, list[str]] = {}
    for sample in _read_list(card, options, folder, options.lists["trainval"]):
        groups.setdefault(sample.label, []).append(sample.source)
    parts = cut(groups, options.shares, card.name, card.classnames)
    return {**parts, "test": _read_list(card, options, folder, options.lists["test"])}


def _read_list(card: Card, options: _Options, folder: Path, name: str) -> tuple[Sample, ...]:
    path = folder / name
    if not path.is_file():
        raise DataError(f"{card.name}: the list {path} is missing.")
    samples = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        fields = line.split()
        if not fields or fields[0].startswith("#"):
            continue
        try:
            if options.label_column is None:
                label = options.class_folders.index(fields[0].split("/")[0])
            else:
                label = int(fields[options.label_column]) - 1
        except (ValueError, IndexError):
            raise DataError(f"{path}, line {number}: no class in {line!r}.") from None
        if not 0 <= label < len(card.classnames):
            raise DataError(f"{path}, line {number}: class number {label + 1} of {len(card.classnames)}.")
        samples.append(Sample(fields[0] + options.suffix, label))
    return tuple(samples)
