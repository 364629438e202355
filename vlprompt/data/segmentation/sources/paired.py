"""pairs: a folder of images and one of masks with the same names, and one phrase for all.

``pairs:PATH`` reads ``PATH/images`` and ``PATH/masks``, cut 60/20/20 by a hash of the names, or the same two folders
inside ``PATH/train``, ``PATH/val`` and ``PATH/test``. The phrase is given with ``phrase=``, or stands in
``PATH/phrase.txt``. A mask is called as its image, perhaps with an ending such as ``_mask``; several of one image
(``_mask_1``) are united.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from vlprompt.core.errors import DataError
from vlprompt.core.paths import user_path
from vlprompt.data.listing import list_folders
from vlprompt.data.segmentation.base import MaskDataset, MaskSample
from vlprompt.data.segmentation.reading import MaskFiles, MaskRule, SizePolicy
from vlprompt.data.segmentation.sources import pair_sources
from vlprompt.data.segmentation.sources._common import (
    Missing,
    class_phrase,
    need_part,
    own_folder,
    refuse_missing,
    split_by_hash,
    stems,
)
from vlprompt.data.sources import Request
from vlprompt.data.sources._layout import Layout, absent, find_folder, parse_options
from vlprompt.data.splits import SPLITS, normal_split

__all__ = ["PairedOptions", "build"]

_EXPECTED = "images/ and masks/, or the same two in train/, val/ and test/"
_SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}
_SUFFIXES = ("", "_mask", "_segmentation", "_Segmentation", "_gt", "_label")


class _Folders(BaseModel):
    """Where one part's images and masks lie; the same folder twice if they lie together."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    images: str
    masks: str


class PairedOptions(Layout):
    """Source options of a card.

    Attributes:
        parts: Folders of each part; ``all`` is cut by ``shares``, and so is ``train`` where there is no ``val``.
        suffix: What a mask's name has behind its image's.
        shares: Part to share.
        threshold: See :class:`MaskRule`.
    """

    parts: dict[Literal["all", "train", "val", "test"], _Folders]
    suffix: str = ""
    shares: dict[Literal["train", "val", "test"], float] = Field(default_factory=dict)
    threshold: float | None = None


@pair_sources.register("pairs", summary="your own images/ and masks/, one phrase", grammar="pairs:PATH")
def build(
    request: Request,
    *,
    threshold: float | None = None,
    suffix: str | None = None,
    on_missing: Missing = "error",
    on_size_mismatch: SizePolicy = "error",
    split_seed: int = 0,
) -> MaskDataset:
    """Build one split.

    Args:
        request: What is asked for.
        threshold: See :class:`MaskRule`; the card's if None.
        suffix: What a mask's name has behind its image's; None takes the one that fits most images.
        on_missing: What to do about images without a mask, and masks without an image.
        on_size_mismatch: What to do where a mask isn't its image's size.
        split_seed: Another cut of the same folder.

    Raises:
        AbsentError: If a card's folders aren't there.
        DataError: If half of a pair is missing, or the folder isn't laid out so; says what.
    """
    if request.card is None:
        folder = own_folder(request, _EXPECTED)
        options = _own_options(request, folder)
    else:
        options = parse_options(request, PairedOptions)
        folder = find_folder(request, options)

    ending = options.suffix if suffix is None and request.card is not None else suffix
    parts: dict[str, tuple[MaskSample, ...]] = {}
    for part, part_folders in options.parts.items():
        _check_folders(request, folder, part, part_folders)
        parts[part] = _pairs(request, folder, part_folders, ending, on_missing)

    shares = {str(part): share for part, share in options.shares.items()} or _SHARES
    cut_parts, how = _cut(request, parts, shares, split_seed)
    rule = MaskRule(options.threshold if threshold is None else threshold)
    names = tuple(request.card.classnames) if request.card else ("object",)
    info = {"source": "pairs", "split_source": how}
    reader = MaskFiles(folder, folder, rule, on_size_mismatch)

    return MaskDataset(request.name, request.split, need_part(request, cut_parts), names, reader, info)


def _own_options(request: Request, folder: Path) -> PairedOptions:
    if (folder / "images").is_dir():
        both = _Folders(images="images", masks="masks")
        return PairedOptions(folders=("",), parts={"all": both})

    parts = {}
    for inner in list_folders(folder, folder):
        split = normal_split(inner.name)
        if split is not None and (inner / "images").is_dir():
            parts[split] = _Folders(images=f"{inner.name}/images", masks=f"{inner.name}/masks")

    if not parts:
        raise DataError(f"{request.name}: {folder} holds no pairs. Expected in it: {_EXPECTED}.")
    return PairedOptions.model_validate({"folders": ("",), "parts": parts})


def _check_folders(request: Request, folder: Path, part: str, part_folders: _Folders) -> None:
    """Refuse a part without its two folders; a card's data set counts as absent then."""
    images = part_folders.images
    masks = part_folders.masks
    if (folder / images).is_dir() and (folder / masks).is_dir():
        return
    if request.card is not None:
        raise absent(request, [f"{folder.name}/{images} and {folder.name}/{masks}"])
    raise DataError(f"{request.name}: {part} needs the folders {images} and {masks}.")


def _pairs(
    request: Request, folder: Path, part_folders: _Folders, suffix: str | None, on_missing: Missing
) -> tuple[MaskSample, ...]:
    """Match the images of one part with their masks."""
    images = stems(folder / part_folders.images)
    masks = stems(folder / part_folders.masks)
    if suffix is None:
        suffix = max(_SUFFIXES, key=lambda s: sum(f"{stem}{s}" in masks for stem in images))

    # Where images and masks lie in one folder, a name with the masks' ending is no image.
    together = part_folders.images == part_folders.masks
    if together:
        ends = re.compile(rf"{re.escape(suffix)}(_\d+)?$")
        images = {s: p for s, p in images.items() if not (suffix and ends.search(s))}

    samples = []
    used = set()
    problems = []
    for stem, files in images.items():
        if len(files) > 1:
            problems.append(f"{' and '.join(files)} are one name")
            continue

        # Of one image several masks may exist: name, name_1, name_2, ...
        names_of_masks = [f"{stem}{suffix}"] if f"{stem}{suffix}" in masks else []
        names_of_masks += [
            f"{stem}{suffix}_{i}" for i in range(1, 20) if suffix and f"{stem}{suffix}_{i}" in masks
        ]
        used.update(names_of_masks)
        ambiguous = [masks[m] for m in names_of_masks if len(masks[m]) > 1]
        if ambiguous:
            problems.append(f"{part_folders.masks}: {' and '.join(ambiguous[0])} are one name")
            continue

        if not names_of_masks:
            problems.append(
                f"{part_folders.images}/{files[0]} has no mask {part_folders.masks}/{stem}{suffix}.*"
            )
            continue

        source = _joined(part_folders.images, files[0])
        paths = tuple(_joined(part_folders.masks, masks[m][0]) for m in names_of_masks)
        samples.append(MaskSample(source, paths, _phrase(request, source), 0, source))

    if not together:
        problems += [f"{part_folders.masks}/{masks[m][0]} has no image" for m in masks if m not in used]

    refuse_missing(request.name, problems, on_missing)
    return tuple(samples)


def _joined(folder: str, name: str) -> str:
    return name if folder == "." else f"{folder}/{name}"


def _phrase(request: Request, record: str) -> str:
    if request.card is not None:
        return class_phrase(request.card.templates, request.card.classnames[0], record)
    path = user_path(request.argument) / "phrase.txt"
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""


def _cut(
    request: Request, parts: dict[str, tuple[MaskSample, ...]], shares: dict[str, float], seed: int
) -> tuple[dict[str, tuple[MaskSample, ...]], str]:
    """Make the splits out of the parts that exist."""
    if "all" in parts:
        how = f"all images cut by name, {shares}, seed {seed}"
        return _by_hash(request, parts["all"], shares, seed), how
    if "val" in parts or "train" not in parts:
        return parts, f"folders {sorted(parts)}"

    of_train = {"val": shares.get("val", 0.1), "train": 1 - shares.get("val", 0.1)}
    how = f"folders {sorted(parts)}; val is {of_train['val']:.0%} of train by name, seed {seed}"
    return {**parts, **_by_hash(request, parts["train"], of_train, seed)}, how


def _by_hash(
    request: Request, samples: tuple[MaskSample, ...], shares: dict[str, float], seed: int
) -> dict[str, tuple[MaskSample, ...]]:
    key = request.card.name if request.card else "pairs"
    chosen = split_by_hash(key, [str(s.source) for s in samples], shares, seed)
    parts: dict[str, tuple[MaskSample, ...]] = {}
    for part in SPLITS:
        if part in shares:
            sources = set(chosen[part])
            parts[part] = tuple(sample for sample in samples if str(sample.source) in sources)
    return parts
