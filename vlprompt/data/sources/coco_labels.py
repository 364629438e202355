"""coco_labels: images with several labels, the classes of the objects in a file of COCO's format.

Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014. A class counts as shown if one object of it is
annotated, a crowd among them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from vlprompt.core.errors import DataError
from vlprompt.core.pixels import check_value_range
from vlprompt.data.base import ImageDataset, Sample
from vlprompt.data.coco import CocoFile, read_coco_file
from vlprompt.data.decoding import Decoding
from vlprompt.data.images import FileReader
from vlprompt.data.sources import Request, sources
from vlprompt.data.sources._layout import Parts, absent, dataset_from, labelled, parse_options

__all__ = ["build"]


class _Part(BaseModel):
    """Where a part lies below the data set's folder.

    Attributes:
        images: Its folder of images.
        annotations: Its JSON file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    images: str
    annotations: str


class _Options(BaseModel):
    """Source options of a card.

    Attributes:
        folders: Folders below the root that may hold the data set, in order of preference.
        parts: By split.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    folders: tuple[str, ...]
    parts: dict[Literal["train", "val", "test"], _Part]


@sources.register("coco_labels", summary="COCO's objects as labels of whole images")
def build(request: Request, *, value_range: Sequence[float] | None = None) -> ImageDataset:
    """Build one split of a card's data set.

    Images without an annotated object can't be trained on and are left out of all parts but test, counted in
    ``info["without_label"]``; in test they are negatives of every class.

    Args:
        request: What is asked for.
        value_range: What becomes black and white in images of more than 8 bits; None: declared or measured.

    Raises:
        AbsentError: If it isn't there.
        DataError: If images or annotations are missing, a file is not in COCO's format, or its classes are not those
            of the card; names the place.
    """
    card = request.need_card
    options = parse_options(request, _Options)
    parts: Parts = dict.fromkeys(options.parts, ())
    limits = check_value_range(value_range, request.name)
    if request.split not in options.parts:
        return dataset_from(request, parts, card.classnames, "", request.root)

    part = options.parts[request.split]
    folder = _folder(request, options, part)
    annotations = folder / part.annotations
    if not annotations.is_file():
        raise DataError(
            f"{card.name}: {folder / part.images} is there, but its annotations {annotations} are missing."
        )

    status = annotations.stat()
    changed = (status.st_mtime_ns, status.st_size, os.stat(folder / part.images).st_mtime_ns)
    file = _read(annotations, folder / part.images, changed)
    _check_classes(card.name, card.classnames, file.classnames, annotations)

    parts[request.split] = tuple(
        Sample(image.name, tuple(sorted({o.label for o in image.objects}))) for image in file.images
    )
    how = f"{part.annotations}; an image's labels are the classes of its objects"
    reader = FileReader(folder / part.images, Decoding(value_range=limits))
    return labelled(dataset_from(request, parts, card.classnames, how, reader))


def _folder(request: Request, options: _Options, part: _Part) -> Path:
    """Return the first folder that holds the part's images. Raises AbsentError if there is none."""
    for folder in options.folders:
        if (request.root / folder / part.images).is_dir():
            return request.root / folder
    raise absent(request, [(Path(f) / part.images).as_posix() for f in options.folders])


@lru_cache(maxsize=3)
def _read(annotations: Path, images: Path, changed: tuple[int, ...]) -> CocoFile:
    """Read a file once per process: COCO's takes seconds, and its splits are opened several times in a run."""
    return read_coco_file(annotations, images, boxes=False, sizes=False)


def _check_classes(name: str, expected: Sequence[str], found: Sequence[str], path: Path) -> None:
    """Refuse a file with other classes than the card's: its labels would mean other words."""
    if tuple(expected) == tuple(found):
        return
    strange = [c for c in found if c not in expected] or [c for c in expected if c not in found]
    example = f", for example {strange[0]!r}" if strange else ", in another order"
    raise DataError(
        f"{name}: {path} has {len(found)} classes and the card {len(expected)}, and they differ{example}."
    )
