"""Files in COCO's format (Lin et al., ECCV 2014): one reader for boxes and for masks, and it guesses nothing.

A file that is wrong in one place trains a wrong model without any error: boxes of another image size score nothing,
run lengths that don't fit read memory that is no mask. So every entry is checked against the format, the other entries
and the image that it is about, and the first that is wrong is named.
"""

from __future__ import annotations

import json
import math
import stat
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vlprompt.core.errors import DataError
from vlprompt.core.files import is_regular_file
from vlprompt.core.names import check_classnames
from vlprompt.data.decoding import MAX_PIXELS
from vlprompt.data.segmentation.pixels import orientation
from vlprompt.data.splits import is_inside

__all__ = ["CocoFile", "CocoImage", "CocoObject", "read_coco_file"]

_ON_ITS_SIDE = (5, 6, 7, 8)  # orientations that exchange width and height
_SLACK = 1.0  # pixels that a box may reach beyond its image by rounding; it is cut, not counted

Id = int | str
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class CocoObject:
    """One object.

    Attributes:
        where: What messages call it, with the file.
        label: Class number.
        crowd: Whether it stands for many objects.
        box: x0, y0, x1, y1 in pixels, inside the image; None where the file gives none.
        segmentation: Polygons or run lengths, as the file has them; see :mod:`vlprompt.data.coco_masks`.
    """

    where: str
    label: int
    crowd: bool
    box: Box | None
    segmentation: Any


@dataclass(frozen=True)
class CocoImage:
    """One image.

    Attributes:
        name: Path below the images' folder, with ``/``.
        size: Width and height in pixels, those of the file too.
        objects: In the order of the file.
    """

    name: str
    size: tuple[int, int]
    objects: tuple[CocoObject, ...]


@dataclass(frozen=True)
class CocoFile:
    """What a file says.

    Attributes:
        classnames: C names, in the order of the categories' ids.
        images: In the order of the file.
    """

    classnames: tuple[str, ...]
    images: tuple[CocoImage, ...]


def read_coco_file(path: Path, folder: Path, *, boxes: bool, sizes: bool = True) -> CocoFile:
    """Read a file of objects, and look at the header of every image.

    Objects without area are left out, and boxes that reach beyond their image are cut; a warning counts both.

    Args:
        path: The JSON file: ``images``, ``annotations``, ``categories``.
        folder: Of the images.
        boxes: Whether every object needs a box.
        sizes: Whether images must have the sizes that the file says; False opens none, where only names of classes
            are read.

    Raises:
        DataError: If the file is not of that format or can't be meant as it is; names the entry.
    """
    raw = _json(path)
    labels, names = _categories(path, _entries(path, raw, "categories"))
    images = _images(path, _entries(path, raw, "images"), folder, sizes)
    annotations = _entries(path, raw, "annotations")
    if not annotations:
        raise DataError(
            f"{path} holds no objects (annotations is empty): nothing could be learned or scored."
        )

    objects: dict[Id, list[CocoObject]] = {identifier: [] for identifier in images}
    seen: set[Id] = set()
    left_out: Counter[str] = Counter()

    for number, entry in enumerate(annotations, 1):
        where = _place(path, "annotation", entry, number)
        if entry.get("id") is not None:
            _once(where, _id(where, entry, "id"), seen)

        image = _id(where, entry, "image_id")
        if image not in images:
            raise DataError(f"{where} belongs to image {image}, which is not listed.")
        category = _id(where, entry, "category_id")
        if category not in labels:
            raise DataError(f"{where} is of category {category}, which is not listed.")

        made = _object(where, entry, labels[category], images[image][1], boxes, left_out)
        if made is not None:
            objects[image].append(made)

    if not any(objects.values()):
        raise DataError(f"{path} holds no object with an area: nothing could be learned or scored.")
    for what, count in left_out.items():
        warnings.warn(f"{path}: {count} of {len(annotations)} objects {what}.", stacklevel=2)
    return CocoFile(
        names, tuple(CocoImage(name, size, tuple(objects[i])) for i, (name, size) in images.items())
    )


def _json(path: Path) -> dict[str, Any]:
    """Return the content. Raises DataError if it is no JSON object, or holds what JSON doesn't allow."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise DataError(f"{path} is no regular file.")
        content = json.loads(path.read_text(encoding="utf-8-sig"), parse_constant=_refuse_constant)
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"can't read {path}: {error.strerror or error}.") from None
    except RecursionError:
        raise DataError(f"{path} is not in COCO's format: it is nested too deeply.") from None
    except ValueError as error:
        raise DataError(f"{path} is not in COCO's format: {error}.") from None

    if not isinstance(content, dict):
        raise DataError(
            f"{path} is not in COCO's format: expected an object with images, annotations and categories."
        )
    return content


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _entries(path: Path, raw: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """Return one of the file's three lists."""
    if key not in raw:
        raise DataError(
            f"{path} is not in COCO's format: KeyError {key!r}; it has {', '.join(raw) or 'nothing'}."
        )
    entries = raw[key]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DataError(
            f"{path} is not in COCO's format: {key} must be a list of objects, got {_short(entries)}."
        )
    return entries


def _categories(path: Path, entries: Sequence[Mapping[str, Any]]) -> tuple[dict[Id, int], tuple[str, ...]]:
    """Return category's id to class number, and the class names."""
    found: dict[Id, str] = {}
    for number, entry in enumerate(entries, 1):
        where = _place(path, "category", entry, number)
        _once(where, _id(where, entry, "id"), found)
        found[_id(where, entry, "id")] = _text(where, entry, "name")
    if not found:
        raise DataError(f"{path} lists no categories.")

    ordered = sorted(found, key=lambda identifier: (isinstance(identifier, str), identifier))
    names = check_classnames([found[identifier] for identifier in ordered], str(path))
    return {identifier: label for label, identifier in enumerate(ordered)}, names


def _images(
    path: Path, entries: Sequence[Mapping[str, Any]], folder: Path, check_sizes: bool
) -> dict[Id, tuple[str, tuple[int, int]]]:
    """Return image's id to its name and its size."""
    images: dict[Id, tuple[str, tuple[int, int]]] = {}
    names: dict[str, str] = {}
    for number, entry in enumerate(entries, 1):
        where = _place(path, "image", entry, number)
        name = _text(where, entry, "file_name").replace("\\", "/")
        if not is_inside(name) or "\0" in name:
            raise DataError(f"{where}: {name!r} leaves the image folder.")

        identifier = _id(where, entry, "id")
        _once(where, identifier, images)
        name = Path(name).as_posix()  # "./a.jpg" is "a.jpg"
        if name in names:
            raise DataError(f"{where}: {name!r} is the file of {names[name]}, too. List each image once.")

        names[name] = f"image {identifier}"
        images[identifier] = (name, (_side(where, entry, "width"), _side(where, entry, "height")))

    if not images:
        raise DataError(f"{path} lists no images.")
    missing = [str(folder / name) for name, _ in images.values() if not is_regular_file(folder / name)]
    if missing:
        raise DataError(f"{path}: {len(missing)} of {len(images)} images are missing, first {missing[0]}.")
    for name, size in images.values() if check_sizes else ():
        _check_size(path, folder / name, size)
    return images


def _check_size(path: Path, image: Path, size: tuple[int, int]) -> None:
    """Refuse sizes that are not the image's: coordinates would mean other pixels."""
    try:
        with Image.open(image) as opened:
            stored = opened.size
    except Exception as error:  # decoders throw many kinds at damaged bytes
        raise DataError(f"can't read the image {image}: {' '.join(str(error).split())}.") from None

    if stored[0] * stored[1] > MAX_PIXELS:
        raise DataError(f"can't read the image {image}: its header claims {stored[0]} x {stored[1]} pixels.")
    turn = orientation(image)
    upright = stored[::-1] if turn in _ON_ITS_SIDE else stored
    if size == upright:
        return

    turned = ""
    if turn != 1:
        turned = f" (stored as {stored[0]} x {stored[1]}, EXIF orientation {turn}; images are read upright)"
    raise DataError(
        f"{path}: {image.name} is {size[0]} x {size[1]} there, but the image is {upright[0]} x {upright[1]} pixels"
        f"{turned}. Coordinates would mean other pixels: mend the sizes, or take the images that were annotated."
    )


def _object(
    where: str,
    entry: Mapping[str, Any],
    label: int,
    size: tuple[int, int],
    boxes: bool,
    left_out: Counter[str],
) -> CocoObject | None:
    """Return an object; None if it has no area, which is counted."""
    crowd = entry.get("iscrowd")
    if crowd is not None and crowd not in (0, 1):
        raise DataError(f"{where}: iscrowd must be 0 or 1, got {_short(crowd)}.")

    box = None
    if boxes or entry.get("bbox") is not None:
        box = _box(where, entry.get("bbox"))
        if boxes and not (box[2] > box[0] and box[3] > box[1]):
            left_out["have no area and are left out"] += 1
            return None
        box = _inside(where, box, size, left_out) if boxes else box
    return CocoObject(where, label, bool(crowd), box, entry.get("segmentation"))


def _box(where: str, value: Any) -> Box:
    if not isinstance(value, list) or len(value) != 4:
        raise DataError(f"{where}: bbox must be [x, y, width, height], got {_short(value)}.")
    x, y, width, height = (_number(where, "bbox", number) for number in value)
    if width < 0 or height < 0:
        raise DataError(f"{where}: bbox must be [x, y, width, height], got a negative side: {_short(value)}.")
    return (x, y, x + width, y + height)


def _inside(where: str, box: Box, size: tuple[int, int], left_out: Counter[str]) -> Box:
    """Return the part of a box that lies in its image. Raises DataError if that is none of it."""
    width, height = size
    x0, y0, x1, y1 = box
    if x0 >= width or y0 >= height or x1 <= 0 or y1 <= 0:
        raise DataError(
            f"{where}: the box from ({x0:g}, {y0:g}) to ({x1:g}, {y1:g}) lies outside its image of {width} x {height}."
        )
    if min(x0, y0) < -_SLACK or x1 > width + _SLACK or y1 > height + _SLACK:
        left_out["reach beyond their image and are cut"] += 1
    return (max(0.0, x0), max(0.0, y0), min(float(width), x1), min(float(height), y1))


def _number(where: str, what: str, value: Any) -> float:
    """Return a finite number. Raises DataError if it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise DataError(f"{where}: {what} must hold numbers, got {_short(value)}.")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise DataError(f"{where}: {what} must hold finite numbers, got {_short(value)}.")
    return number


def _id(where: str, entry: Mapping[str, Any], key: str) -> Id:
    """Return an id. ``7``, ``7.0`` and ``"7"`` are one, as tools write them; other texts are ids as they are."""
    value = entry.get(key)
    if isinstance(value, str) and value.strip():
        text = value.strip()
        return int(text) if text.isascii() and text.isdigit() and str(int(text[:20])) == text else text
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise DataError(f"{where}: {key} must be a whole number or a text, got {_short(value)}.")


def _once(where: str, identifier: Id, seen: Any) -> None:
    """Refuse an id that another entry has, and remember it if ``seen`` is a set."""
    if identifier in seen:
        raise DataError(f"{where}: the id {identifier!r} is that of another entry, too. Give each its own.")
    if isinstance(seen, set):
        seen.add(identifier)


def _text(where: str, entry: Mapping[str, Any], key: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {key} must be a text, got {_short(value)}.")
    return value


def _side(where: str, entry: Mapping[str, Any], key: str) -> int:
    value = entry.get(key)
    number = _number(where, key, value) if value is not None else 0.0
    if number < 1 or not number.is_integer():
        raise DataError(f"{where}: {key} must be a number of pixels, got {_short(value)}.")
    return int(number)


def _place(path: Path, kind: str, entry: Mapping[str, Any], number: int) -> str:
    """Return what messages call an entry: by its id, else by its number in the list."""
    identifier = entry.get("id")
    named = f"{kind} {identifier}" if isinstance(identifier, (int, str)) else f"{kind} number {number}"
    return f"{path}: {named[:80]}"


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except (RecursionError, ValueError):
        return f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:60]}..."
