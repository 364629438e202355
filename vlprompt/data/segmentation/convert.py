"""Turning other formats into one binary mask per image and class, the layout of ``per_class:PATH``.

COCO's polygons and run lengths are drawn by pycocotools, the reference; masks of class numbers are cut by value.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlprompt.core.errors import DataError
from vlprompt.core.files import write_atomic
from vlprompt.core.names import check_classnames
from vlprompt.data.segmentation.pixels import raw_values
from vlprompt.data.segmentation.sources._common import stems
from vlprompt.data.splits import is_inside

__all__ = ["Converted", "convert_coco", "convert_indexed"]

Converted = dict[str, int]
"""Class name to the number of masks written."""
Progress = Callable[[int, int], None]


def convert_coco(
    annotations: Path, images: Path, out: Path, split: str = "train", progress: Progress | None = None
) -> Converted:
    """Write a COCO instance file as binary masks: the union of a class's objects in an image.

    Args:
        annotations: The JSON file.
        images: Folder of its images; they are linked into ``out``, or copied where links can't be made.
        out: Folder to write ``images/<split>`` and ``annotations/<split>/<class>`` into.
        split: Name of the part.
        progress: Called with (done, all).

    Raises:
        DataError: If the file is no COCO instance file, images are missing, or pycocotools is.
    """
    content = _coco(annotations)
    names = check_classnames([str(c["name"]) for c in content["categories"]], str(annotations))
    class_of = {c["id"]: name for c, name in zip(content["categories"], names, strict=True)}

    of_image: dict[Any, list[Any]] = {}
    for annotation in content["annotations"]:
        of_image.setdefault(annotation["image_id"], []).append(annotation)

    missing = [i["file_name"] for i in content["images"] if not (images / i["file_name"]).is_file()]
    if missing:
        raise DataError(
            f"{images}: {len(missing)} images of {annotations.name} are missing, for example {missing[0]}."
        )

    written: Converted = dict.fromkeys(names, 0)
    for done, image in enumerate(content["images"], 1):
        masks: dict[str, NDArray[np.bool_]] = {}
        for annotation in of_image.get(image["id"], []):
            name = class_of[annotation["category_id"]]
            pixels = _object_pixels(annotation, int(image["height"]), int(image["width"]), annotations)
            masks[name] = masks[name] | pixels if name in masks else pixels
        _write(out, split, images / image["file_name"], image["file_name"], masks, written)
        if progress is not None:
            progress(done, len(content["images"]))

    return written


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
        DataError: If a mask has no image, is coloured or can't be read.
    """
    check_classnames(list(classes), "classes")
    originals = stems(images)
    written = dict.fromkeys(classes, 0)
    files_of = stems(masks)
    lacking = [stem for stem in files_of if stem not in originals]
    if lacking:
        raise DataError(f"{masks}: {len(lacking)} masks have no image in {images}, for example {lacking[0]}.")

    for done, (stem, files) in enumerate(files_of.items(), 1):
        raw = raw_values(masks / files[0])
        present = {name: raw == value for name, value in classes.items() if bool((raw == value).any())}
        _write(out, split, images / originals[stem][0], originals[stem][0], present, written)
        if progress is not None:
            progress(done, len(files_of))

    return written


def _write(
    out: Path,
    split: str,
    original: Path,
    name: str,
    masks: Mapping[str, NDArray[np.bool_]],
    written: Converted,
) -> None:
    """Put an image and its masks in their places."""
    if not is_inside(name):
        raise DataError(f"{name!r} leaves the image folder.")

    target = out / "images" / split / name
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        try:
            target.hardlink_to(original)
        except OSError:
            shutil.copyfile(original, target)

    for label, mask in masks.items():
        mask_path = out / "annotations" / split / label / f"{Path(name).with_suffix('')}.png"
        mask_image = Image.fromarray(mask.astype(np.uint8) * 255)
        write_atomic(mask_path, lambda path, image=mask_image: image.save(path, "PNG"))  # type: ignore[misc]
        written[label] += 1


def _coco(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        for key, fields in (("images", ("id", "file_name", "height", "width")), ("categories", ("id", "name")),
                            ("annotations", ("image_id", "category_id"))):  # fmt: skip
            for entry in content[key]:
                _ = [entry[f] for f in fields]
        listed = {c["id"] for c in content["categories"]}
        unlisted = [a["category_id"] for a in content["annotations"] if a["category_id"] not in listed]
        if unlisted:
            raise DataError(f"{path}: an annotation has the category {unlisted[0]}, which isn't listed.")
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is no COCO instance file: {type(error).__name__} {error}.") from None

    return dict(content)


def _object_pixels(annotation: dict[str, Any], height: int, width: int, path: Path) -> NDArray[np.bool_]:
    """Return (H, W) pixels of one object."""
    try:
        from pycocotools import mask as coco
    except ImportError:
        raise DataError("COCO masks need pycocotools: pip install 'vlprompt[segmentation]'.") from None

    shape = annotation.get("segmentation")
    try:
        if isinstance(shape, list) and shape:
            runs = coco.merge(coco.frPyObjects(shape, height, width))
        elif isinstance(shape, dict):
            runs = coco.frPyObjects(shape, height, width) if isinstance(shape["counts"], list) else shape
        else:
            raise ValueError("it has no polygon and no run lengths")
        return np.asarray(coco.decode(runs)).astype(bool)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(f"{path}: annotation {annotation.get('id')}: {error}.") from None
