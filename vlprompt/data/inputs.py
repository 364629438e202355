"""Whatever a user calls an image, or many: files, folders, bytes, arrays, tensors, opened images. Addresses never."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vlprompt.core.errors import DataError
from vlprompt.core.names import printable
from vlprompt.core.paths import user_path
from vlprompt.core.pixels import to_rgb
from vlprompt.data.base import ImageDataset
from vlprompt.data.decoding import decode, read_image, upright
from vlprompt.data.images import EXTENSIONS
from vlprompt.data.listing import list_images

__all__ = ["ImageInput", "image_inputs", "open_image"]

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_CHANNELS = (1, 3, 4)
_KINDS = (
    "a path, a folder, a PIL image, an array or tensor of pixels, the bytes of a file, an open file, a data set, or "
    "many of these"
)


@dataclass(frozen=True)
class ImageInput:
    """One image, not opened yet.

    Attributes:
        name: What a table calls it.
        source: A path, the bytes of a file, an image or an array of one image's pixels.
    """

    name: str
    source: Path | bytes | Image.Image | np.ndarray[Any, Any]

    def open(self) -> Image.Image:
        """Return the image as RGB, upright.

        Raises:
            DataError: If it can't be read; says why.
        """
        if isinstance(self.source, Path):
            return read_image(self.source)
        if isinstance(self.source, bytes):
            return decode(self.source, self.name)
        if isinstance(self.source, Image.Image):
            return open_image(self.source, self.name)
        return to_rgb(_from_pixels(self.source))


def open_image(image: Image.Image, name: str = "the image") -> Image.Image:
    """Return an opened image as RGB, upright, as its file would be read.

    Raises:
        DataError: If it is damaged: Pillow decodes late.
    """
    try:
        return upright(image)
    except (
        Exception
    ) as error:  # decoders raise OSError, SyntaxError, struct.error and others at damaged bytes
        raise DataError(
            f"can't read {name}: {' '.join(str(error).split()) or type(error).__name__}."
        ) from None


def image_inputs(images: Any) -> Iterator[ImageInput]:
    """Yield the images that an argument means, one by one and without opening them.

    Args:
        images: A folder (searched at any depth), a file, a PIL image, the bytes of a file, an open binary file, an
            array or tensor of pixels, a data set; or a list, a generator or any other iterable of these. Pixels are
            (H, W), (H, W, 3) or (3, H, W), or (N, ...) for many; bytes, or floats in [0, 1].

    Raises:
        DataError: If it is nothing of that, or holds no image.
    """
    count = 0
    for item in _items(images):
        for source in _sources(item):
            name = printable(str(source)) if isinstance(source, Path) else f"image {count}"
            yield ImageInput(name, source)
            count += 1
    if not count:
        raise DataError("no images to predict.")


def _items(images: Any) -> Iterable[Any]:
    """Return what may be many images as single arguments."""
    if isinstance(images, ImageDataset):
        return (images[index][0] for index in range(len(images)))
    single = (str, Path, bytes, bytearray, memoryview, Image.Image, np.ndarray, torch.Tensor)
    if isinstance(images, single) or _is_file(images):
        return [images]
    if isinstance(images, Mapping) or not isinstance(images, Iterable):
        raise DataError(f"an image is {_KINDS}; got {_described(images)}.")
    return images


def _sources(item: Any) -> Iterator[Path | bytes | Image.Image | np.ndarray[Any, Any]]:
    if isinstance(item, (str, Path)):
        yield from _files(item)
    elif isinstance(item, Image.Image):
        yield item
    elif isinstance(item, (bytes, bytearray, memoryview)):
        yield bytes(item)
    elif isinstance(item, (np.ndarray, torch.Tensor)):
        yield from _arrays(item)
    elif _is_file(item):
        yield _content(item)
    else:
        raise DataError(f"an image is {_KINDS}; got {_described(item)}.")


def _files(item: str | Path) -> Iterator[Path]:
    text = str(item)
    if _ADDRESS.match(text):
        raise DataError(
            f"{text[:200]!r} is an address: nothing is fetched. Download the image and give its path."
        )
    if not text or "\0" in text:
        raise DataError(f"{text[:200]!r} is no path of an image.")

    path = user_path(item)
    try:
        is_folder = path.is_dir()
    except OSError as error:
        raise DataError(f"{printable(text)[:200]!r} is no path of an image: {error.strerror}.") from None
    if not is_folder:
        yield path
        return

    names = list_images(path, path)
    if not names:
        raise DataError(f"{printable(text)} holds no images ({', '.join(EXTENSIONS)}).")
    yield from (path / name for name in names)


def _arrays(item: np.ndarray[Any, Any] | torch.Tensor) -> Iterator[np.ndarray[Any, Any]]:
    """Yield the pixels of every image of an array, (H, W) or (H, W, channels)."""
    if isinstance(item, torch.Tensor):
        item = item.detach().cpu()
        item = item.float() if item.dtype == torch.bfloat16 else item
        pixels = item.numpy()
    else:
        pixels = item

    if pixels.dtype.kind not in "bufi":
        raise DataError(f"an array of pixels holds numbers; got the type {pixels.dtype}.")
    if not pixels.size:
        raise DataError(f"an array of pixels of shape {pixels.shape} holds no image.")

    if pixels.ndim == 4:
        for image in pixels:
            yield _channels_last(image, pixels.shape)
    elif pixels.ndim in (2, 3):
        yield _channels_last(pixels, pixels.shape)
    else:
        raise DataError(f"pixels are (H, W), (H, W, 3), (3, H, W) or (N, ...) for many; got {pixels.shape}.")


def _channels_last(pixels: np.ndarray[Any, Any], shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    if pixels.ndim == 2:
        return pixels
    first = pixels.shape[0] in _CHANNELS
    last = pixels.shape[2] in _CHANNELS
    if first and last:
        raise DataError(
            f"pixels of shape {shape} can be (channels, H, W) or (H, W, channels). Pass a PIL image instead."
        )
    if not first and not last:
        raise DataError(f"pixels are (H, W), (H, W, 3), (3, H, W) or (N, ...) for many; got {shape}.")
    return np.moveaxis(pixels, 0, 2) if first else pixels


def _from_pixels(pixels: np.ndarray[Any, Any]) -> Image.Image:
    """Return an image of bytes, or of numbers from 0 to 1."""
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    if pixels.dtype == bool:
        pixels = pixels.astype(np.float32)
    if pixels.dtype.kind == "f":
        low, high = float(np.min(pixels)), float(np.max(pixels))
        if not (low >= 0 and high <= 1):  # NaN fails too
            raise DataError(
                f"pixels that are floats lie in [0, 1]; got {low:g} to {high:g}. What was preprocessed already goes "
                "into learner(images)."
            )
        return Image.fromarray(np.round(pixels.astype(np.float64) * 255).astype(np.uint8))

    low, high = int(pixels.min()), int(pixels.max())
    if low < 0 or high > 255:
        raise DataError(f"pixels that are whole numbers lie in 0 to 255; got {low} to {high}.")
    return Image.fromarray(np.ascontiguousarray(pixels.astype(np.uint8)))


def _is_file(item: Any) -> bool:
    return callable(getattr(item, "read", None))  # any library's idea of an open file


def _content(file: Any) -> bytes:
    try:
        data = file.read()
    except Exception as error:
        raise DataError(
            f"can't read the open file: {' '.join(str(error).split()) or type(error).__name__}."
        ) from None
    if not isinstance(data, bytes):
        raise DataError("an open file of an image is binary: open(path, 'rb').")
    return data


def _described(item: Any) -> str:
    return f"{type(item).__name__} {repr(item)[:80]}"
