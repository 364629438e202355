"""Masks from files: which pixels a file means, and what is refused of it.

A mask that is read wrongly trains a wrong model without any error, so nothing is guessed: a file with more than two
values, or of another size than its image, is an error until the user says what it means.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlprompt.core.errors import DataError
from vlprompt.core.paths import user_path
from vlprompt.data.images import FileReader, file_stamp
from vlprompt.data.segmentation.base import IGNORE, MaskReader, MaskSample
from vlprompt.data.segmentation.pixels import orientation, raw_values, seen_values

__all__ = ["MaskFiles", "MaskRule", "SizePolicy", "read_mask", "resize_mask"]

SizePolicy = Literal["error", "resize"]


@dataclass(frozen=True)
class MaskRule:
    """How a mask's pixel values are read.

    Attributes:
        threshold: Of a binary mask: larger values are inside. None: the file must hold one value beside 0, whichever
            (1, 255, 65535). JPEG files and masks that were resized smoothly need one, in the range of their own values.
        ignore: Values of pixels that don't count.
    """

    threshold: float | None = None
    ignore: tuple[int, ...] = ()


def read_mask(
    path: str | os.PathLike[str], rule: MaskRule = MaskRule(), values: Sequence[int] = ()
) -> NDArray[np.uint8]:
    """Read one mask file.

    A binary mask is read by what one sees: the colours of a palette, black outside; or the opacity of an image of one
    colour. Masks of class numbers are read by the numbers that are stored, whatever a palette paints them in. An image
    in three equal channels is one in one channel.

    Args:
        path: The file.
        rule: How its values are read.
        values: Values that mean the class, in a mask of many classes; empty for a binary one.

    Returns:
        (H, W) uint8: 1 inside, 0 outside, 255 where it doesn't count.

    Raises:
        DataError: If the file is missing, no image, or holds colours or values that ``rule`` doesn't explain.
    """
    file = user_path(path)
    if values:
        numbers = raw_values(file)
        void = np.isin(numbers, rule.ignore) if rule.ignore else np.zeros(numbers.shape, bool)
        inside = np.isin(numbers, values)
        return np.where(void, np.uint8(IGNORE), inside.astype(np.uint8))

    seen, stored = seen_values(file, rule.threshold, rule.ignore)
    void = np.isin(stored, rule.ignore) if rule.ignore else np.zeros(seen.shape, bool)
    inside = _inside(file, seen, void, rule.threshold)
    return np.where(void, np.uint8(IGNORE), inside.astype(np.uint8))


def resize_mask(mask: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Return a mask at another (width, height), by the nearest pixel."""
    return np.asarray(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST))


@dataclass(frozen=True)
class MaskFiles(MaskReader):
    """Reads images below one folder and masks below another; sources are relative paths with ``/``.

    Attributes:
        images: Folder of the images.
        masks: Folder of the masks.
        rule: How masks are read.
        on_size_mismatch: What to do where a mask isn't its image's size.
    """

    images: Path
    masks: Path
    rule: MaskRule = MaskRule()
    on_size_mismatch: SizePolicy = "error"

    @property
    def _files(self) -> FileReader:
        return FileReader(self.images)

    def read(self, source: str) -> Image.Image:
        """See :meth:`FileReader.read`."""
        return self._files.read(source)

    def check(self, source: str) -> str:
        """See :meth:`FileReader.check`."""
        return self._files.check(source)

    def key(self, source: str) -> str:
        """See :meth:`FileReader.key`."""
        return self._files.key(source)

    def mask(self, sample: MaskSample, size: tuple[int, int]) -> NDArray[np.uint8]:
        """Return the union of a pair's masks (see :meth:`vlprompt.data.segmentation.base.MaskReader.mask`)."""
        whole = np.zeros(size[::-1], np.uint8)
        for name in sample.masks:
            part = read_mask(self.masks / name, self.rule, sample.values)
            whole = _unite(whole, self._fitted(part, sample, name, size))
        return whole

    def stamp(self, source: str) -> str:
        """See :meth:`FileReader.stamp`."""
        return self._files.stamp(source)

    def mask_stamp(self, sample: MaskSample) -> str:
        """See :meth:`MaskReader.mask_stamp`."""
        return " ".join(file_stamp(self.masks / name) for name in sample.masks)

    def _fitted(
        self, part: NDArray[np.uint8], sample: MaskSample, name: str, size: tuple[int, int]
    ) -> NDArray[np.uint8]:
        height, width = part.shape
        if (width, height) == size:
            return part
        turned = (height, width) == size
        if self.on_size_mismatch == "error" or turned:
            raise DataError(self._misfit(sample, name, size, (width, height), turned))
        return resize_mask(part, size)

    def _misfit(
        self, sample: MaskSample, name: str, size: tuple[int, int], own: tuple[int, int], turned: bool
    ) -> str:
        """Return what is wrong with a mask of another size than its image; (width, height) each."""
        mask = self.masks / name
        image = self.images / str(sample.source)
        what = f"the mask {mask} is {own[0]} x {own[1]}, its image {image} is {size[0]} x {size[1]}."
        states = (orientation(image), orientation(mask))
        if states != (1, 1):
            what += (
                " Both are read upright, by the orientation of their EXIF blocks: the image's says "
                f"{states[0]}, the mask's {states[1]} (1 is upright)."
            )
        if turned:
            return f"{what} One of them lies on its side: turn it, or mend its EXIF orientation."
        return f"{what} Mend one of them, or pass on_size_mismatch='resize' if they show the same."


def _unite(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the union; a pixel that is outside both and ignored in one is ignored."""
    inside = (a == 1) | (b == 1)
    void = (a == IGNORE) | (b == IGNORE)
    return np.where(inside, np.uint8(1), np.where(void, np.uint8(IGNORE), np.uint8(0)))


def _inside(
    path: Path, raw: NDArray[Any], void: NDArray[np.bool_], threshold: float | None
) -> NDArray[np.bool_]:
    if threshold is not None:
        return raw > threshold

    values = np.unique(raw[~void])
    if len(values) > 2 or (len(values) == 2 and values[0] != 0):
        examples = ", ".join(str(v) for v in values[:6]) + (", ..." if len(values) > 6 else "")
        raise DataError(
            f"the mask {path} holds {len(values)} values ({examples}); a binary one holds 0 and one other. If it is "
            "a JPEG or was resized, pass threshold=127; if the values are classes, name them (a card's values, or "
            "`vlprompt data convert indexed`)."
        )

    return raw != 0
