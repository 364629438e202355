"""What the sources of cards share: finding folders, reading published splits, saying what is missing."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from vlprompt.core.errors import ConfigError, DataError
from vlprompt.data.base import ImageDataset, Reader, Sample
from vlprompt.data.cards import validation_problems
from vlprompt.data.images import FileReader
from vlprompt.data.sources import AbsentError, Request
from vlprompt.data.splits import SPLITS, read_split

__all__ = [
    "Layout",
    "Parts",
    "absent",
    "check_present",
    "dataset_from",
    "find_folder",
    "labelled",
    "parse_options",
    "published_split",
]

Parts = dict[str, tuple[Sample, ...]]
Model = TypeVar("Model", bound=BaseModel)


class Layout(BaseModel):
    """Where a card's images lie.

    Attributes:
        folders: Folders below the root that may hold the data set, in order of preference.
        images: The image folder below it, which split files and lists are relative to.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    folders: tuple[str, ...]
    images: str = ""


def parse_options(request: Request, model: type[Model]) -> Model:
    """Return the card's source options as ``model``. Raises ConfigError with all mistakes."""
    try:
        return model.model_validate(request.options)
    except ValidationError as error:
        where = f"card {request.need_card.name}: source.options"
        raise ConfigError(validation_problems(error, model), where) from None


def find_folder(request: Request, layout: Layout) -> Path:
    """Return the first folder that holds the image folder.

    Raises:
        AbsentError: If there is none.
    """
    for folder in layout.folders:
        if (request.root / folder / layout.images).is_dir():
            return request.root / folder
    raise absent(request, [str(Path(f) / layout.images) for f in layout.folders])


def absent(request: Request, looked: list[str]) -> AbsentError:
    """Return the error of a source that found nothing at some places below the root."""
    return AbsentError(f"{request.name} is not in {request.root}: looked for {' or '.join(looked)}.")


def published_split(
    request: Request, layout: Layout, folder: Path
) -> tuple[Parts, tuple[str, ...], str] | None:
    """Return parts, class names and a description of the published split, None if its file isn't there.

    The file is looked for in ``folder``, then in the other folders of the layout.

    Raises:
        DataError: If the file is not of this data set, or images that it lists are missing.
    """
    card = request.need_card
    images = folder / layout.images
    if card.splits.file is None:
        return None

    folders = [folder, *(request.root / name for name in layout.folders)]
    candidates = [candidate / card.splits.file for candidate in folders]
    path = next((p for p in candidates if p.is_file()), None)
    if path is None:
        return None

    split_file = read_split(path, card.splits.checksum)
    if len(split_file.classnames) != len(card.classnames):
        raise DataError(
            f"{path} has {len(split_file.classnames)} classes, {card.name} has {len(card.classnames)}."
        )

    # The published names win: they are what the reference results were measured with.
    if [n.casefold() for n in split_file.classnames] != [n.casefold() for n in card.classnames]:
        pair = next(p for p in zip(split_file.classnames, card.classnames, strict=True) if p[0] != p[1])
        warnings.warn(
            f"{path} calls a class {pair[0]!r} that the card calls {pair[1]!r}; its names are used.",
            stacklevel=4,
        )

    check_present(card.name, path.name, images, split_file.parts)
    return split_file.parts, split_file.classnames, f"{path.name} sha256 {split_file.sha256}"


def check_present(name: str, listed_by: str, images: Path, parts: Mapping[str, tuple[Sample, ...]]) -> None:
    """Refuse a split whose images are not all there; names the first ones. Raises DataError."""
    listed = [str(s.source) for split in SPLITS for s in parts.get(split, ())]
    missing = [source for source in listed if not (images / source).is_file()]
    if missing:
        raise DataError(
            f"{name}: {len(missing)} of the {len(listed)} images that {listed_by} lists are missing in "
            f"{images}, for example {', '.join(missing[:3])}."
        )


def dataset_from(
    request: Request, parts: Parts, names: tuple[str, ...], how: str, reader: Reader | Path
) -> ImageDataset:
    """Return a card's data set over samples in parts.

    Args:
        request: What is asked for.
        parts: Samples of each split that exists.
        names: Class names.
        how: Where the parts come from, for the record.
        reader: Reader of their sources, or the folder that they are files in.

    Raises:
        DataError: If the split doesn't exist.
    """
    card = request.need_card
    if request.split not in parts:
        existing = ", ".join(parts)
        raise DataError(
            f"{card.name} has no split {request.split!r}, only {existing}. Few-shot draws make their own validation "
            "part with sampling='elevater'; otherwise train with validate_on: none."
        )

    info = {"source": (request.source or card.source).kind, "split_source": how}
    read = FileReader(reader) if isinstance(reader, Path) else reader
    return ImageDataset(request.name, request.split, parts[request.split], names, card.templates, read, info)


def labelled(dataset: ImageDataset) -> ImageDataset:
    """Return a multi-label data set without the images that show no class for certain; the test part keeps them.

    How many were left out stands in ``info["without_label"]``.
    """
    if dataset.split == "test":
        return dataset
    kept = dataset.with_label()
    return replace(kept, info={**kept.info, "without_label": len(dataset) - len(kept)})
