"""Masks of COCO's objects: polygons, which pycocotools draws, and run lengths, which are read here.

Reference: cocodataset/cocoapi common/maskApi.h for both forms of run lengths.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlprompt.core.errors import DataError

__all__ = ["object_mask"]

_FEWEST = 6  # numbers of a polygon: three points
_LONGEST_RUN = 8  # characters of one number of compressed run lengths


def object_mask(shape: Any, size: tuple[int, int], where: str) -> NDArray[np.bool_]:
    """Return the (H, W) pixels of one object.

    Args:
        shape: ``segmentation`` of its annotation: a list of polygons, or run lengths, ``{"size": [H, W], "counts":
            ...}``, as a list or compressed.
        size: Width and height of the image in pixels.
        where: What messages call it.

    Raises:
        DataError: If it is neither, doesn't fit the image, or pycocotools is missing.
    """
    if isinstance(shape, dict):
        return _of_runs(shape, size, where)
    if isinstance(shape, list) and shape:
        return _of_polygons(shape, size, where)
    raise DataError(f"{where}: it has no polygon and no run lengths.")


def _of_polygons(shape: list[Any], size: tuple[int, int], where: str) -> NDArray[np.bool_]:
    try:
        from pycocotools import mask as coco
    except ImportError:
        raise DataError("COCO masks need pycocotools: pip install 'vlprompt[segmentation]'.") from None

    if all(isinstance(number, (int, float)) for number in shape):
        raise DataError(
            f"{where}: a segmentation is a list of polygons, [[x, y, x, y, ...]]; got the numbers of one."
        )

    width, height = size
    whole = np.zeros((height, width), bool)
    for polygon in shape:
        points = _clipped(_points(polygon, size, where), size)
        if len(points) < _FEWEST // 2:  # nothing of it lies in the image
            continue
        # A list of four numbers would be a box to pycocotools; a polygon has at least six.
        (runs,) = coco.frPyObjects([points.flatten().tolist()], height, width)
        whole |= np.asarray(coco.decode(runs), bool)
    return whole


def _points(polygon: Any, size: tuple[int, int], where: str) -> NDArray[np.float64]:
    """Return the (n, 2) points of a polygon. Raises DataError if it is none."""
    if not isinstance(polygon, list) or len(polygon) < _FEWEST or len(polygon) % 2:
        count = len(polygon) if isinstance(polygon, list) else 0
        raise DataError(
            f"{where}: a polygon has three points or more, x and y of each, so an even count of at least {_FEWEST} "
            f"numbers; got {count}."
        )

    for number in polygon:
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not abs(number) < math.inf:
            raise DataError(f"{where}: a polygon holds finite numbers, got {str(number)[:40]!r}.")
    # So large a shift is no rounding: the coordinates are of another image, or damaged.
    for number, side in zip(polygon, size * (len(polygon) // 2), strict=True):
        if not -side <= number <= 2 * side:
            raise DataError(
                f"{where}: the polygon reaches {number:g}, far outside its image of {size[0]} x {size[1]} pixels."
            )
    return np.asarray(polygon, np.float64).reshape(-1, 2)


def _clipped(points: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.float64]:
    """Return the part of a polygon that lies in the image (Sutherland and Hodgman, CACM 1974)."""
    for axis, bound, sign in ((0, 0.0, 1), (0, float(size[0]), -1), (1, 0.0, 1), (1, float(size[1]), -1)):
        inside = sign * (points[:, axis] - bound) >= 0
        if inside.all():
            continue

        clipped = []
        for index in range(len(points)):
            last = points[index - 1]
            here = points[index]
            if inside[index] != inside[index - 1]:
                share = (bound - last[axis]) / (here[axis] - last[axis])
                clipped.append(last + share * (here - last))
            if inside[index]:
                clipped.append(here)
        if not clipped:
            return np.empty((0, 2))
        points = np.stack(clipped)

    return points


def _of_runs(shape: dict[str, Any], size: tuple[int, int], where: str) -> NDArray[np.bool_]:
    width, height = size
    if shape.get("size") != [height, width]:
        raise DataError(
            f"{where}: its run lengths are of size {str(shape.get('size'))[:40]}, its image of [{height}, {width}] "
            "(height, width)."
        )

    counts = shape.get("counts")
    if isinstance(counts, str):
        counts = _uncompressed(counts, where)
    if not isinstance(counts, list) or not all(type(count) is int and count >= 0 for count in counts):
        raise DataError(f"{where}: run lengths are a list of numbers that are not negative, or a text.")
    if sum(counts) != width * height:
        raise DataError(
            f"{where}: its run lengths add up to {sum(counts)} pixels, its image has {width} x {height} = "
            f"{width * height}."
        )

    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(width, height).T


def _uncompressed(text: str, where: str) -> list[int]:
    """Return the numbers of compressed run lengths: five bits a character, differences to the number before last."""
    counts: list[int] = []
    number = 0
    digits = 0
    for character in text:
        value = ord(character) - 48
        if not 0 <= value < 64 or digits == _LONGEST_RUN:
            raise DataError(f"{where}: {character!r} can't stand where it does in compressed run lengths.")

        number |= (value & 31) << (5 * digits)
        digits += 1
        if value & 32:  # more of this number follows
            continue
        if value & 16:
            number -= 1 << (5 * digits)
        counts.append(number + (counts[-2] if len(counts) > 2 else 0))
        number = 0
        digits = 0

    if digits:
        raise DataError(f"{where}: the compressed run lengths end inside a number.")
    return counts
