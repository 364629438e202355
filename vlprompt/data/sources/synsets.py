"""synsets: ImageNet and its variants, class folders named by WordNet ids (or, in V2, by label).

Differs from the reference code: there, the validation list is the test list, so choosing a model by it uses test
images. Here val is cut from train. The variants are for testing only and have no other split.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

from pydantic import Field

from vlprompt.core.errors import DataError
from vlprompt.core.pixels import check_value_range
from vlprompt.data.base import ImageDataset, Sample
from vlprompt.data.decoding import Decoding
from vlprompt.data.imagenet import synset_ids
from vlprompt.data.images import EXTENSIONS, FileReader
from vlprompt.data.listing import is_hidden
from vlprompt.data.sources import Request, sources
from vlprompt.data.sources._layout import Layout, Parts, absent, dataset_from, parse_options
from vlprompt.data.splits import cut

__all__ = ["build"]


class _Options(Layout):
    """Source options of a card.

    Attributes:
        parts: Folder of each part below ``images``, ``""`` for that folder itself.
        numbered: Whether class folders are labels (``0`` ... ``999``) instead of WordNet ids.
        shares: Shares of the train folder that become val and train.
    """

    parts: dict[Literal["train", "test"], str]
    numbered: bool = False
    shares: dict[Literal["val", "train"], float] = Field(default_factory=dict)


@sources.register("synsets", summary="ImageNet and its variants: folders named by WordNet ids")
def build(request: Request, *, value_range: Sequence[float] | None = None) -> ImageDataset:
    """Build one split of a card's data set.

    Args:
        request: What is asked for.
        value_range: What becomes black and white in images of more than 8 bits; None: declared or measured.

    Raises:
        AbsentError: If it isn't there.
        DataError: If class folders are missing or empty.
    """
    card = request.need_card
    options = parse_options(request, _Options)
    splits: list[str] = [*options.parts, *(["val"] if options.shares else [])]
    if request.split not in splits:
        raise DataError(
            f"{card.name} is for testing only: it has no split {request.split!r}, only {', '.join(splits)}."
        )

    part = options.parts["test" if request.split == "test" else "train"]
    root = _folder(request, options, part)
    ids = synset_ids(str(card.synsets))
    folders = [str(label) for label in range(len(ids))] if options.numbered else list(ids)
    groups = _listing(card.name, root, tuple(folders), os.stat(root).st_mtime_ns)
    whole = tuple(Sample(p, label) for label, images in enumerate(groups) for p in images)
    parts: Parts = {request.split: whole}  # the variants are used whole
    how = f"class folders of {part or options.images}"

    if options.shares and request.split != "test":
        parts = _cut(card.name, card.classnames, tuple(options.shares.items()), groups)
        how = f"{how}; {card.splits.otherwise}"

    reader = FileReader(root, Decoding(value_range=check_value_range(value_range, request.name)))
    return dataset_from(request, parts, card.classnames, how, reader)


def _folder(request: Request, options: _Options, part: str) -> Path:
    candidates = [Path(f) / options.images / part for f in options.folders]
    for candidate in candidates:
        if (request.root / candidate).is_dir():
            return request.root / candidate
    raise absent(request, [p.as_posix() for p in candidates])


@lru_cache(maxsize=8)
def _listing(name: str, root: Path, folders: tuple[str, ...], changed: int) -> tuple[tuple[str, ...], ...]:
    """Return the images of every class, sorted, as paths relative to ``root``.

    ImageNet has 1.3 million of them, so they are listed once per process and without a look at each.

    Raises:
        DataError: If class folders are missing or empty; names the first ones.
    """
    images_of = []
    for folder in folders:
        try:
            with os.scandir(root / folder) as entries:
                names = sorted(e.name for e in entries if e.name.lower().endswith(EXTENSIONS))
        except FileNotFoundError:
            names = []
        images_of.append(tuple(f"{folder}/{n}" for n in names if not is_hidden(n)))

    bad = [f for f, images in zip(folders, images_of, strict=True) if not images]
    if bad:
        raise DataError(
            f"{name}: {len(bad)} of the {len(folders)} class folders in {root} are missing or empty, for example "
            f"{', '.join(bad[:5])}."
        )
    return tuple(images_of)


@lru_cache(maxsize=2)
def _cut(
    name: str,
    classnames: Sequence[str],
    shares: tuple[tuple[str, float], ...],
    groups: tuple[tuple[str, ...], ...],
) -> Parts:
    return cut(dict(enumerate(groups)), dict(shares), name, classnames)
