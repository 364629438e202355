"""Masks from files: which pixels a file means, and what is refused of it.

A mask that is read wrongly trains a wrong model without any error, so nothing is guessed: a file with more than two
values, or of another size than its image, is an error until the user says what it means.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from vlprompt.core.errors import DataError
from vlprompt.core.paths import user_path
from vlprompt.data.images import MAX_PIXELS, FileReader, UndecodableError, file_stamp
from vlprompt.data.segmentation.base import IGNORE, MaskReader, MaskSample

__all__ = ["MaskFiles", "MaskRule", "SizePolicy", "raw_values", "read_mask", "resize_mask"]

SizePolicy = Literal["error", "resize"]


@dataclass(frozen=True)
class MaskRule:
    """How a mask's pixel values are read.

    Attributes:
        threshold: Of a binary mask: larger values are inside. None: the file must hold one value beside 0, whichever
            (1, 255, 65535). JPEG files and masks that were resized smoothly need one.
        ignore: Values of pixels that don't count.
    """

    threshold: int | None = None
    ignore: tuple[int, ...] = ()


def read_mask(
    path: str | os.PathLike[str], rule: MaskRule = MaskRule(), values: Sequence[int] = ()
) -> NDArray[np.uint8]:
    """Read one mask file.

    Palette files are read by index, not by colour; an image in three equal channels is one in one channel.

    Args:
        path: The file.
        rule: How its values are read.
        values: Values that mean the class, in a mask of many classes; empty for a binary one.

    Returns:
        (H, W) uint8: 1 inside, 0 outside, 255 where it doesn't count.

    Raises:
        DataError: If the file is missing, no image, coloured, or holds values that ``rule`` doesn't explain.
    """
    file = user_path(path)
    raw = raw_values(file, rule.threshold)
    void = np.isin(raw, rule.ignore) if rule.ignore else np.zeros(raw.shape, bool)
    inside = np.isin(raw, values) if values else _inside(file, raw, void, rule.threshold)
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
        if self.on_size_mismatch == "error":
            raise DataError(
                f"the mask {self.masks / name} is {width} x {height}, its image {self.images / str(sample.source)} "
                f"is {size[0]} x {size[1]}. Mend one of them, or pass on_size_mismatch='resize' if they show the same."
            )
        return resize_mask(part, size)


def _unite(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the union; a pixel that is outside both and ignored in one is ignored."""
    inside = (a == 1) | (b == 1)
    void = (a == IGNORE) | (b == IGNORE)
    return np.where(inside, np.uint8(1), np.where(void, np.uint8(IGNORE), np.uint8(0)))


def raw_values(path: Path, threshold: int | None = None) -> NDArray[np.int64]:
    """Return a mask file's own values, (H, W); palette files by index.

    With a threshold a coloured file is fine: what is bright in any channel is inside.

    Raises:
        DataError: If the file is missing, damaged, too large or coloured.
    """
    try:
        with Image.open(path) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise DataError(f"the mask {path} claims {opened.width} x {opened.height} pixels.")
            image = ImageOps.exif_transpose(opened)
            array = np.asarray(image)
    except DataError:
        raise
    except FileNotFoundError:
        raise UndecodableError(path, "the mask does not exist") from None
    except Exception as error:  # decoders throw many kinds at damaged bytes
        raise UndecodableError(path, " ".join(str(error).split()).rstrip(".")) from None

    if array.ndim == 3:
        colours = array[..., : 1 if image.mode in ("LA", "La") else 3]
        if threshold is not None:
            return colours.max(-1).astype(np.int64)
        if (colours != colours[..., :1]).any():
            raise DataError(
                f"the mask {path} is a colour image. A mask has one channel with 0 outside, or class numbers; "
                "convert it first, or pass threshold=127 if everything that isn't black is inside."
            )
        array = colours[..., 0]

    return array.astype(np.int64)


def _inside(
    path: Path, raw: NDArray[np.int64], void: NDArray[np.bool_], threshold: int | None
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
