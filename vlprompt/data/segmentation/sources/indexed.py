"""indexed: masks whose pixel values are class numbers: PASCAL VOC's palette files, Cityscapes' labelIds.

Every image is paired with every class; which classes it shows is read from its mask when it matters.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from vlprompt.core.files import is_regular_file
from vlprompt.data.cards import Card
from vlprompt.data.listing import list_images
from vlprompt.data.segmentation.base import MaskDataset, MaskSample
from vlprompt.data.segmentation.reading import MaskFiles, MaskRule, SizePolicy
from vlprompt.data.segmentation.sources import pair_sources
from vlprompt.data.segmentation.sources._common import Missing, class_phrase, need_part, refuse_missing
from vlprompt.data.segmentation.sources.per_class import with_validation
from vlprompt.data.sources import Request
from vlprompt.data.sources._layout import Layout, absent, find_folder, parse_options

__all__ = ["IndexedOptions", "build"]


class _Part(BaseModel):
    """One split: a file with a name a line, or a folder that is searched."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    list: str = ""
    folder: str = ""


class IndexedOptions(Layout):
    """Source options of a card.

    Attributes:
        masks: The mask folder, beside ``images``.
        image_end: What an image's file name has behind its name.
        mask_end: What its mask's has.
        parts: Train and val; val is what is tested on (see :mod:`vlprompt.data.segmentation.sources.per_class`).
        values: Pixel values of each class, by label.
        ignore: Pixel values that don't count.
    """

    masks: str
    image_end: str
    mask_end: str
    parts: dict[Literal["train", "val"], _Part]
    values: tuple[tuple[int, ...], ...]
    ignore: tuple[int, ...] = ()


@pair_sources.register("indexed", summary="masks whose pixel values are class numbers")
def build(
    request: Request, *, on_missing: Missing = "error", on_size_mismatch: SizePolicy = "error"
) -> MaskDataset:
    """Build one split of a card's data set.

    Args:
        request: What is asked for.
        on_missing: What to do about images without a mask, and masks without an image.
        on_size_mismatch: What to do where a mask isn't its image's size.

    Raises:
        AbsentError: If it isn't there.
        DataError: If halves of pairs are missing.
    """
    card = request.need_card
    options = parse_options(request, IndexedOptions)
    folder = find_folder(request, options)
    if not (folder / options.masks).is_dir():
        raise absent(request, [f"{folder.name}/{options.masks}"])

    parts: dict[str, tuple[MaskSample, ...]] = {}
    for split, part in options.parts.items():
        names = _names(request, folder, options, part)
        problems = []
        samples: list[MaskSample] = []
        for name in names:
            image = f"{name}{options.image_end}"
            mask = f"{name}{options.mask_end}"
            paths = (folder / options.images / image, folder / options.masks / mask)
            missing = [path for path in paths if not is_regular_file(path)]
            if missing:
                problems.append(f"{name} lacks {missing[0]}")
            else:
                samples += _samples(card, options, image, mask)

        refuse_missing(f"{request.name} ({split})", problems, on_missing)
        parts[split] = tuple(samples)

    parts, how = with_validation(card.name, parts)
    rule = MaskRule(ignore=options.ignore)
    reader = MaskFiles(folder / options.images, folder / options.masks, rule, on_size_mismatch)
    info = {"source": "indexed", "split_source": how}

    return MaskDataset(request.name, request.split, need_part(request, parts), card.classnames, reader, info)


def _samples(card: Card, options: IndexedOptions, image: str, mask: str) -> Iterator[MaskSample]:
    """Yield one pair for each class, whether the image shows it or not."""
    for label, classname in enumerate(card.classnames):
        record = f"{image}|{classname}"
        phrase = class_phrase(card.templates, classname, record)
        yield MaskSample(image, (mask,), phrase, label, record, options.values[label])


def _names(request: Request, folder: Path, options: IndexedOptions, part: _Part) -> list[str]:
    if part.list:
        path = folder / part.list
        if not path.is_file():
            raise absent(request, [f"{folder.name}/{part.list}"])
        return [line.split()[0] for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]

    part_folder = folder / options.images / part.folder
    if not part_folder.is_dir():
        raise absent(request, [f"{folder.name}/{options.images}/{part.folder}"])

    images = list_images(part_folder, folder / options.images)
    return [p.removesuffix(options.image_end) for p in images if p.endswith(options.image_end)]
