"""split-json: pictures in a folder and a published split file in the few-shot protocol's format."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from vlprompt.data.base import ImageDataset, Sample
from vlprompt.data.cards import Card, validation_problems
from vlprompt.data.images import FileReader
from vlprompt.data.sources import Request, sources
from vlprompt.data.splits import SPLITS, read_split
from vlprompt.errors import ConfigError, DataError

__all__ = ["Layout", "build", "dataset_from", "find_folder", "not_found", "parse_options", "published_split"]

OFFLINE = "digits, scenes/shape and the other scenes need no download"


class Layout(BaseModel):
    """Where a card's pictures lie.

    Attributes:
        folders: Folders below the root that may hold the data set, in order of preference.
        images: The image folder below it, which split files are relative to.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    folders: tuple[str, ...]
    images: str = ""


@sources.register("split-json", summary="a published split file and its pictures, placed by hand")
def build(request: Request) -> ImageDataset:
    """Build one split of a card's data set.

    Raises:
        DataError: If the pictures or the split file are not there; says what to put where.
    """
    card = request.need_card
    layout = parse_options(card, Layout)
    folder = find_folder(request.root, layout)
    if folder is None:
        raise not_found(request, layout, "")
    split = published_split(request, layout, folder)
    if split is None:
        raise DataError(
            f"{card.name}: {folder / str(card.splits.file)} is missing. Get it from {card.splits.url}."
        )
    parts, names, how = split
    return dataset_from(request, folder / layout.images, parts[request.split], names, how)


def parse_options(card: Card, model: type[Any]) -> Any:
    """Return the card's source options as ``model``. Raises ConfigError with all mistakes."""
    try:
        return model.model_validate(card.source.options)
    except ValidationError as error:
        raise ConfigError(validation_problems(error, model), f"card {card.name}: source.options") from None


def find_folder(root: Path, layout: Layout) -> Path | None:
    """Return the first folder that holds the image folder."""
    return next((root / f for f in layout.folders if (root / f / layout.images).is_dir()), None)


def published_split(
    request: Request, layout: Layout, folder: Path
) -> tuple[dict[str, tuple[Sample, ...]], tuple[str, ...], str] | None:
    """Return parts, class names and a description of the published split, None if its file isn't there.

    The file is looked for in ``folder``, then in the other folders of the layout.

    Raises:
        DataError: If the file is not of this data set, or pictures that it lists are missing.
    """
    card, images = request.need_card, folder / layout.images
    places = [f / str(card.splits.file) for f in (folder, *(request.root / f for f in layout.folders))]
    path = next((p for p in places if p.is_file()), None)
    if card.splits.file is None or path is None:
        return None
    found = read_split(path, card.splits.sha256)
    if len(found.classnames) != len(card.classnames):
        raise DataError(
            f"{path} has {len(found.classnames)} classes, {card.name} has {len(card.classnames)}."
        )
    if [n.casefold() for n in found.classnames] != [n.casefold() for n in card.classnames]:
        pair = next(p for p in zip(found.classnames, card.classnames, strict=True) if p[0] != p[1])
        warnings.warn(
            f"{path} calls a class {pair[0]!r} that the card calls {pair[1]!r}; its names are used.",
            stacklevel=4,
        )
    check_present(card.name, path.name, images, found.parts)
    return found.parts, found.classnames, f"{path.name} sha256 {found.sha256}"


def check_present(name: str, listed_by: str, images: Path, parts: Mapping[str, tuple[Sample, ...]]) -> None:
    """Refuse a split whose pictures are not all there; names the first ones. Raises DataError."""
    listed = [str(s.source) for split in SPLITS for s in parts[split]]
    missing = [source for source in listed if not (images / source).is_file()]
    if missing:
        raise DataError(
            f"{name}: {len(missing)} of the {len(listed)} pictures that {listed_by} lists are missing in "
            f"{images}, for example {', '.join(missing[:3])}."
        )


def dataset_from(
    request: Request, images: Path, samples: tuple[Sample, ...], names: tuple[str, ...], how: str
) -> ImageDataset:
    """Return a card's data set over pictures in a folder."""
    card = request.need_card
    info = {"source": card.source.kind, "split_source": how}
    return ImageDataset(request.name, request.split, samples, names, card.templates, FileReader(images), info)


def not_found(request: Request, layout: Layout, how: str) -> DataError:
    """Return the error for a data set that isn't there: what to do, by program, by hand and instead."""
    card = request.need_card
    looked = " or ".join(str(Path(f) / layout.images) for f in layout.folders)
    return DataError(
        f"{card.name} ({card.title}) is not in {request.root}: looked for {looked}. {how}"
        f"By hand: {card.by_hand.strip()} (ROOT is {request.root}, or what root=... or VLPROMPT_DATA say). "
        f"Without it: {OFFLINE}."
    )
