"""per_class: one binary mask per image and class, which is what conversions write (``vlprompt data convert``).

``PATH/images/<split>/<image>`` and ``PATH/annotations/<split>/<class>/<image's name>.png``, only for classes that
occur in an image. Signs of a class that a folder can't have are written as in web addresses (``tv%2Fmonitor``).
Folders are called train, val, test or training, validation. Where there is no test part, the
official validation part is tested on, and a tenth of the training images validates: no part is used for both.

Reference: the layout of naamiinepal/tunevlseg's binarised data sets.
"""

from __future__ import annotations

from pathlib import Path

from vlprompt.core.errors import DataError
from vlprompt.core.names import check_classnames
from vlprompt.core.slugs import folder_word, text_of
from vlprompt.data.listing import list_folders
from vlprompt.data.segmentation.base import MaskDataset, MaskSample
from vlprompt.data.segmentation.reading import MaskFiles, MaskRule, SizePolicy
from vlprompt.data.segmentation.sources import pair_sources
from vlprompt.data.segmentation.sources._common import (
    Missing,
    class_phrase,
    need_part,
    one_of_each,
    own_folder,
    refuse_missing,
    split_by_hash,
    stems,
)
from vlprompt.data.sources import Request
from vlprompt.data.sources._layout import Layout, find_folder, parse_options
from vlprompt.data.splits import normal_split

__all__ = ["PerClassOptions", "build", "with_validation"]

_EXPECTED = "images/<split>/ and annotations/<split>/<class>/, as `vlprompt data convert` writes them"
_OF_TRAIN = {"val": 0.1, "train": 0.9}
_PLAIN = ("{}",)


class PerClassOptions(Layout):
    """Source options of a card.

    Attributes:
        annotations: The folder of the masks, beside ``images``.
        own_names: The class folders, by label; the class names if empty.
    """

    images: str = "images"
    annotations: str = "annotations"
    own_names: tuple[str, ...] = ()


@pair_sources.register("per_class", summary="one binary mask per image and class", grammar="per_class:PATH")
def build(
    request: Request,
    *,
    threshold: float | None = None,
    on_missing: Missing = "error",
    on_size_mismatch: SizePolicy = "error",
) -> MaskDataset:
    """Build one split.

    Args:
        request: What is asked for.
        threshold: See :class:`MaskRule`.
        on_missing: What to do about masks without an image.
        on_size_mismatch: What to do where a mask isn't its image's size.

    Raises:
        AbsentError: If a card's folders aren't there.
        DataError: If the folder isn't laid out so, or masks have no image.
    """
    if request.card is None:
        options = PerClassOptions(folders=("",))
        folder = own_folder(request, _EXPECTED)
    else:
        options = parse_options(request, PerClassOptions)
        folder = find_folder(request, options)

    images = folder / options.images
    masks = folder / options.annotations
    splits = {normal_split(p.name): p.name for p in list_folders(masks, masks)} if masks.is_dir() else {}
    splits.pop(None, None)
    if not splits:
        raise DataError(f"{request.name}: {folder} holds no masks by class. Expected in it: {_EXPECTED}.")

    origins, names = _classes(request, options, masks, [str(n) for n in splits.values()])
    templates = request.card.templates if request.card else _PLAIN

    parts = {}
    for split, inner in splits.items():
        part_samples, problems = _part(images, masks, inner, origins, names, templates)
        refuse_missing(f"{request.name} ({inner})", problems, on_missing)
        parts[str(split)] = part_samples

    parts, how = with_validation(request.name, parts)
    reader = MaskFiles(images, masks, MaskRule(threshold), on_size_mismatch)
    info = {"source": "per_class", "split_source": how}

    return MaskDataset(request.name, request.split, need_part(request, parts), names, reader, info)


def with_validation(
    name: str, parts: dict[str, tuple[MaskSample, ...]]
) -> tuple[dict[str, tuple[MaskSample, ...]], str]:
    """Return three parts of two: the official validation part is for testing, a tenth of train validates."""
    if "test" in parts or "val" not in parts or "train" not in parts:
        return parts, f"folders {sorted(parts)}"

    images = list(dict.fromkeys(str(s.source) for s in parts["train"]))
    chosen = split_by_hash(name, images, _OF_TRAIN)
    val_images = set(chosen["val"])
    train = tuple(sample for sample in parts["train"] if str(sample.source) not in val_images)
    val = tuple(sample for sample in parts["train"] if str(sample.source) in val_images)

    how = "official val is test; val is 10 % of train by name"
    return {"train": train, "val": val, "test": parts["val"]}, how


def _classes(
    request: Request, options: PerClassOptions, masks: Path, splits: list[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the class folders and the class names."""
    if request.card is not None:
        names = request.card.classnames
        return options.own_names or tuple(map(folder_word, names)), names
    origins = sorted({p.name for s in splits for p in list_folders(masks / s, masks)})
    if not origins:
        raise DataError(f"{request.name}: {masks} holds no class folders. Expected: {_EXPECTED}.")
    return tuple(origins), check_classnames(list(map(text_of, origins)), request.name, origins)


def _part(
    images: Path,
    masks: Path,
    split: str,
    origins: tuple[str, ...],
    names: tuple[str, ...],
    templates: tuple[str, ...],
) -> tuple[tuple[MaskSample, ...], list[str]]:
    """Return the pairs of one split in the images' order, and what is wrong with it."""
    files = one_of_each(images / split, stems(images / split)) if (images / split).is_dir() else {}
    present: dict[str, list[MaskSample]] = {stem: [] for stem in files}

    problems = []
    for label, origin in enumerate(origins):
        folder = masks / split / origin
        mask_files = one_of_each(folder, stems(folder)) if folder.is_dir() else {}
        for stem, name in mask_files.items():
            mask_file = f"{split}/{origin}/{name}"
            if stem not in files:
                problems.append(f"{mask_file} has no image")
                continue

            source = f"{split}/{files[stem]}"
            phrase = class_phrase(templates, names[label], mask_file)
            present[stem].append(MaskSample(source, (mask_file,), phrase, label, mask_file))

    # In the order of the images, so that the pairs of one image follow each other.
    return tuple(sample for pairs in present.values() for sample in pairs), problems
