"""images: files in a folder, split by a published split file, by class folders, or by official lists.

The published few-shot split is used when its file lies in the data set's folder. Otherwise the images are cut by
class folder, or official lists are followed; a cut is stored as ``split_local_*.json``, and results say which it was.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from vlprompt.core.errors import DataError, UnknownNameError
from vlprompt.core.pixels import check_value_range
from vlprompt.data.base import ImageDataset, Sample
from vlprompt.data.decoding import Decoding
from vlprompt.data.images import FileReader
from vlprompt.data.listing import list_images
from vlprompt.data.sources import Request, sources
from vlprompt.data.sources._layout import (
    Layout,
    Parts,
    check_present,
    dataset_from,
    find_folder,
    parse_options,
    published_split,
)
from vlprompt.data.sources._parts import PartSpec
from vlprompt.data.splits import SPLITS, cut, read_split, write_split

__all__ = ["build"]

_SPLIT_SOURCES = ("auto", "published", "resplit", "lists")


class _Options(Layout):
    """Source options of a card.

    Attributes:
        class_folders: Folder of each class in ``images``, by label, for cutting.
        lists: Official lists by part; ``trainval`` is cut by ``shares``.
        own_names: What lists call each class, by label; its folder, else its number from 1, if empty.
        shares: Part to share, per class; for class folders, or for ``trainval``.
    """

    class_folders: tuple[str, ...] = ()
    lists: dict[Literal["train", "val", "trainval", "test"], PartSpec] = Field(default_factory=dict)
    own_names: tuple[str, ...] = ()
    shares: dict[str, float] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _cuttable(self) -> _Options:
        needed = (
            {"val", "train"} if "trainval" in self.lists else set(SPLITS) if self.class_folders else set()
        )
        if needed and not (self.lists and not self.shares) and set(self.shares) != needed:
            raise ValueError(f"shares must be given for {sorted(needed)}, got {sorted(self.shares)}")
        return self


@sources.register("images", summary="image files with a published split, class folders or official lists")
def build(
    request: Request,
    *,
    split_source: Literal["auto", "published", "resplit", "lists"] = "auto",
    value_range: Sequence[float] | None = None,
) -> ImageDataset:
    """Build one split of a card's data set.

    Args:
        request: What is asked for.
        split_source: ``"published"`` insists on the protocol's split file, ``"resplit"`` cuts class folders,
            ``"lists"`` follows official lists; ``"auto"`` takes the first of these that the data set has.
        value_range: What becomes black and white in images of more than 8 bits; None: declared or measured.

    Raises:
        AbsentError: If it isn't there.
        DataError: If it is incomplete; says what is missing.
    """
    options = parse_options(request, _Options)
    if split_source not in _SPLIT_SOURCES:
        raise UnknownNameError("split_source", str(split_source), _SPLIT_SOURCES)
    folder = find_folder(request, options)
    parts, names, how = _split(request, options, folder, split_source)
    limits = check_value_range(value_range, request.name)
    return dataset_from(
        request, parts, names, how, FileReader(folder / options.images, Decoding(value_range=limits))
    )


def _split(
    request: Request, options: _Options, folder: Path, wanted: str
) -> tuple[Parts, tuple[str, ...], str]:
    card = request.need_card
    images = folder / options.images
    if wanted in ("auto", "published"):
        published = published_split(request, options, folder)
        if published is not None:
            return published

    if options.class_folders and options.shares and wanted in ("auto", "resplit"):
        return _stored(request, options, folder, images)

    if options.lists and wanted in ("auto", "lists"):
        if "trainval" in options.lists:
            return _stored(request, options, folder, images)
        parts: Parts = {s: _read_list(request, options, folder, s) for s in SPLITS if s in options.lists}
        check_present(card.name, "the official lists", images, parts)
        return parts, card.classnames, f"official lists {', '.join(p.path for p in options.lists.values())}"

    if card.splits.file and wanted in ("auto", "published"):
        raise DataError(
            f"{card.name}: {folder / card.splits.file} is missing. Fetch it with `vlprompt data prepare {card.name}`, "
            f"or get it from {card.splits.url}."
        )
    raise DataError(f"{card.name} has no split_source={wanted!r}.")


def _stored(
    request: Request, options: _Options, folder: Path, images: Path
) -> tuple[Parts, tuple[str, ...], str]:
    """Return our own cut: as it was stored, or made now and stored."""
    card = request.need_card
    path = folder / f"split_local_{card.name}.json"
    if not path.is_file():
        parts = (
            _cut_lists(request, options, folder)
            if "trainval" in options.lists
            else _cut_folders(request, options, images)
        )
        if sum(map(len, parts.values())) != sum(card.splits.sizes.values()):
            warnings.warn(
                f"{card.name}: {sum(map(len, parts.values()))} images in {images}, "
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


def _cut_folders(request: Request, options: _Options, images: Path) -> Parts:
    card = request.need_card
    missing = [f for f in options.class_folders if not (images / f).is_dir()]
    if missing:
        raise DataError(f"{card.name}: class folders are missing in {images}: {', '.join(missing[:5])}.")
    groups = {label: list_images(images / f, images) for label, f in enumerate(options.class_folders)}
    return cut(groups, options.shares, card.name, card.classnames)


def _cut_lists(request: Request, options: _Options, folder: Path) -> Parts:
    card = request.need_card
    groups: dict[int, list[str]] = {}
    for sample in _read_list(request, options, folder, "trainval"):
        groups.setdefault(sample.classes[0], []).append(sample.source)
    parts = cut(groups, options.shares, card.name, card.classnames)
    return {**parts, "test": _read_list(request, options, folder, "test")}


def _read_list(request: Request, options: _Options, folder: Path, part: str) -> tuple[Sample, ...]:
    card = request.need_card
    numbers = tuple(str(i + 1) for i in range(len(card.classnames)))
    own_names = options.own_names or options.class_folders or numbers
    try:
        return tuple(options.lists[part].read(folder, folder / options.images, own_names))  # type: ignore[index]
    except DataError as error:
        raise DataError(f"{card.name}: {error}") from None
