"""Turning other formats into one binary mask per image and class, the layout of ``per_class:PATH``.

COCO's polygons are drawn by pycocotools, the reference; masks of class numbers are cut by value. A part that is
converted again is what a conversion into an empty folder would be: files that an earlier one wrote are removed.
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlprompt.core.errors import DataError
from vlprompt.core.files import write_atomic, write_json
from vlprompt.core.names import check_classnames
from vlprompt.core.slugs import folder_word
from vlprompt.data.coco import CocoImage, read_coco_file
from vlprompt.data.coco_masks import object_mask
from vlprompt.data.segmentation.pixels import raw_values
from vlprompt.data.segmentation.sources._common import one_of_each, stems
from vlprompt.data.splits import is_inside

__all__ = ["Converted", "convert_coco", "convert_indexed"]

Converted = dict[str, int]
"""Class name to the number of masks written."""
Progress = Callable[[int, int], None]
Masks = dict[str, NDArray[np.bool_]]


def convert_coco(
    annotations: Path, images: Path, out: Path, split: str = "train", progress: Progress | None = None
) -> Converted:
    """Write a COCO instance file as binary masks: the union of a class's objects in an image.

    Objects that cover no pixel are left out, and counted in a warning.

    Args:
        annotations: The JSON file.
        images: Folder of its images; they are linked into ``out``, or copied where links can't be made.
        out: Folder to write ``images/<split>`` and ``annotations/<split>/<class>`` into. A class's folder is its name,
            with signs that a path can't hold written as in web addresses (``tv%2Fmonitor``).
        split: Name of the part.
        progress: Called with (done, all).

    Raises:
        DataError: If the file can't be meant as it is (see :func:`vlprompt.data.coco.read_coco_file`), two images would
            share a mask, ``out`` holds files that no conversion wrote, or pycocotools is missing.
    """
    file = read_coco_file(annotations, images, boxes=False)
    _refuse_shared_masks(annotations, [entry.name for entry in file.images])

    # Everything is read once before anything is written: a mistake in the last object leaves no half-converted folder.
    for entry in file.images:
        _class_masks(entry, file.classnames)

    part = _Part(out, split, file.classnames)
    empty = 0
    for done, entry in enumerate(file.images, 1):
        masks, without_pixels = _class_masks(entry, file.classnames)
        empty += without_pixels
        part.add(images / entry.name, entry.name, masks)
        if progress is not None:
            progress(done, len(file.images))

    part.finish()
    if empty:
        warnings.warn(f"{annotations}: {empty} objects cover no pixel and are left out.", stacklevel=2)
    return part.written


def convert_indexed(
    masks: Path,
    images: Path,
    classes: Mapping[str, int],
    out: Path,
    split: str = "train",
    progress: Progress | None = None,
) -> Converted:
    """Write masks of class numbers as binary ones.

    Args:
        masks: Folder of masks, called as their images.
        images: Folder of the images.
        classes: Class name to its number in the masks; other numbers are ground.
        out: See :func:`convert_coco`.
        split: Name of the part.
        progress: Called with (done, all).

    Raises:
        DataError: If a mask has no image, is coloured or can't be read, a name means two files, two classes have one
            number, or ``out`` holds files that no conversion wrote.
    """
    check_classnames(list(classes), "classes")
    numbers = list(classes.values())
    twice = [name for name, number in classes.items() if numbers.count(number) > 1]
    if twice:
        raise DataError(f"classes: {' and '.join(twice)} have one number, {classes[twice[0]]}.")

    originals = one_of_each(images, stems(images))
    files = one_of_each(masks, stems(masks))
    lacking = [stem for stem in files if stem not in originals]
    if lacking:
        raise DataError(f"{masks}: {len(lacking)} masks have no image in {images}, for example {lacking[0]}.")

    part = _Part(out, split, tuple(classes))
    for done, (stem, name) in enumerate(files.items(), 1):
        raw = raw_values(masks / name)
        present = {label: raw == value for label, value in classes.items() if bool((raw == value).any())}
        part.add(images / originals[stem], originals[stem], present)
        if progress is not None:
            progress(done, len(files))

    part.finish()
    return part.written


class _Part:
    """One part of a converted data set, as it is written.

    ``conversion_<split>.json`` lists the files that conversions wrote. It is written before anything else, so that
    after a kill it is still known that the part's files are a conversion's.

    Args:
        out: Folder of the data set.
        split: Name of the part.
        classnames: C names.

    Raises:
        DataError: If the part holds files that no conversion wrote.
    """

    def __init__(self, out: Path, split: str, classnames: tuple[str, ...]) -> None:
        self.out = out
        self.folders = (f"images/{split}", f"annotations/{split}")
        self.record = out / f"conversion_{split}.json"
        self.written: Converted = dict.fromkeys(classnames, 0)
        self._files: set[str] = set()

        known = self._known()
        foreign = [name for name in self._present() if known is not None and name not in known]
        if foreign:
            raise DataError(
                f"{out} holds {len(foreign)} files that no conversion wrote, for example {foreign[0]}. Name an empty "
                "folder with --out."
            )
        write_json(self.record, {"whole": False, "files": sorted(known or ())})

    def add(self, original: Path, name: str, masks: Mapping[str, NDArray[np.bool_]]) -> None:
        """Put an image and its masks in their places."""
        if not is_inside(name):
            raise DataError(f"{name!r} leaves the image folder.")
        _put(original, self._path(f"{self.folders[0]}/{name}"))

        stem = PurePosixPath(name).with_suffix("")
        for label, mask in masks.items():
            image = Image.fromarray(mask.astype(np.uint8) * 255)
            path = self._path(f"{self.folders[1]}/{folder_word(label)}/{stem}.png")
            write_atomic(path, lambda temporary, image=image: image.save(temporary, "PNG"))  # type: ignore[misc]
            self.written[label] += 1

    def finish(self) -> None:
        """Remove what an earlier conversion wrote and this one did not."""
        for name in self._present():
            if name not in self._files:
                (self.out / name).unlink()
        for folder in self.folders:
            for parent, _, _ in os.walk(self.out / folder, topdown=False):
                if not os.listdir(parent):
                    os.rmdir(parent)
        write_json(self.record, {"whole": True, "files": sorted(self._files)})

    def _path(self, name: str) -> Path:
        self._files.add(name)
        return self.out / name

    def _present(self) -> list[str]:
        """Return the part's files, with their folder."""
        names = []
        for folder in self.folders:
            for parent, _, files in os.walk(self.out / folder):
                names += [Path(parent, name).relative_to(self.out).as_posix() for name in files]
        return sorted(names)

    def _known(self) -> set[str] | None:
        """Return the files of an earlier conversion; None if all are, since it was killed."""
        try:
            content = json.loads(self.record.read_text(encoding="utf-8"))
            return set(map(str, content["files"])) if content["whole"] else None
        except FileNotFoundError:
            return set()
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"{self.record} is damaged ({error}). Name an empty folder with --out.") from None


def _put(original: Path, target: Path) -> None:
    """Link or copy an image, replacing another one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        if target.samefile(original) or filecmp.cmp(target, original, shallow=False):
            return
        target.unlink()

    try:
        target.hardlink_to(os.path.realpath(original))  # of the file itself, where the original is a link
    except OSError:
        write_atomic(target, lambda temporary: shutil.copyfile(original, temporary))  # type: ignore[arg-type]


def _class_masks(entry: CocoImage, classnames: tuple[str, ...]) -> tuple[Masks, int]:
    """Return class name to the (H, W) union of its objects, and the number of objects without a pixel."""
    masks: Masks = {}
    empty = 0
    for item in entry.objects:
        pixels = object_mask(item.segmentation, entry.size, item.where)
        if not pixels.any():
            empty += 1
            continue
        name = classnames[item.label]
        masks[name] = masks[name] | pixels if name in masks else pixels

    return masks, empty


def _refuse_shared_masks(annotations: Path, names: list[str]) -> None:
    """Refuse a.jpg beside a.png: both masks would be a.png, and one would be lost."""
    first_of: dict[str, str] = {}
    for name in names:
        first = first_of.setdefault(str(PurePosixPath(name).with_suffix("")), name)
        if first != name:
            raise DataError(
                f"{annotations}: the masks of {first} and {name} would share a file. Give one of them another name."
            )
