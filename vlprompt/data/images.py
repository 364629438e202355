"""Images from files: robust decoding, content keys, and a check that finds unreadable images early.

Images are decoded in threads and processes, where the user sees no traceback, so a damaged file becomes one sentence
with its name. :func:`verify` decodes every image of a split once, before any worker starts: which images are used is
then the same in every process.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps

from vlprompt.core.errors import DataError
from vlprompt.core.paths import user_path
from vlprompt.data.base import ImageDataset, Reader

__all__ = [
    "EXTENSIONS",
    "BadImage",
    "FileReader",
    "UndecodableError",
    "VerificationReport",
    "decode",
    "drop_bad",
    "file_stamp",
    "pixel_key",
    "read_image",
    "read_with_note",
    "to_rgb",
    "verify",
]

EXTENSIONS = (".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
# Where Pillow itself begins to warn: 256 MiB of RGB. A header that claims more is treated as an attack.
MAX_PIXELS = 89_478_485
# A line of one pixel by a million is a small file, but huge after its shorter side is enlarged to a tower's input.
MAX_ASPECT = 500
BadImagePolicy = Literal["skip", "error"]

# Path, bytes, modification time in ns: while they are equal, a file is not read again.
_Stat = tuple[str, int, int]
_digests: dict[_Stat, str] = {}
_verdicts: dict[_Stat, str] = {}


def read_image(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an image file to 8-bit RGB, upright.

    EXIF orientation is applied, the first frame of an animation is taken, transparency is laid on white,
    16-bit and float greys are scaled to 8 bits, CMYK and palettes are converted.

    Args:
        path: The file.
        max_pixels: Largest declared width x height; checked before any pixel is decoded.

    Raises:
        DataError: If the file is missing, truncated, too large, a thread of pixels or no image; names the file and
            the reason.
    """
    with _opened(user_path(path), user_path(path), max_pixels) as image:
        return _upright(image)


def read_with_note(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> tuple[Image.Image, str]:
    """Decode an image file as :func:`read_image` does, and say what the decoded pixels don't show.

    Returns:
        The image, and a note of further frames, other colours or more depth; empty if there is none of that.

    Raises:
        DataError: As :func:`read_image` does.
    """
    with _opened(user_path(path), user_path(path), max_pixels) as image:
        mode = image.mode
        return _upright(image), "; ".join(filter(None, (_frames_note(image), _mode_note(mode))))


@dataclass(frozen=True)
class FileReader(Reader):
    """Reads images below one folder; a source is a path relative to it, with ``/``.

    Attributes:
        root: The folder.
        max_pixels: See :func:`read_image`.
    """

    root: Path
    max_pixels: int = MAX_PIXELS

    def path(self, source: str) -> Path:
        """Return where a source lies."""
        return self.root / source

    def read(self, source: str) -> Image.Image:
        """Return the image as RGB (see :func:`read_image`)."""
        return read_image(self.path(source), self.max_pixels)

    def check(self, source: str) -> str:
        """Return why an image can't be decoded, empty if it can; remembered like :meth:`key`."""
        return _verdict(self.path(source), self.max_pixels)

    def key(self, source: str) -> str:
        """Return ``file:`` and the sha256 of the bytes; remembered until size or time of change differ."""
        path = self.path(source)
        try:
            stat = _stat(path)
            if stat not in _digests:
                _digests[stat] = "file:" + hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise DataError(f"can't read the image {path}: {error.strerror or error}.") from None

        return _digests[stat]

    def stamp(self, source: str) -> str:
        """See :meth:`Reader.stamp`; ``"absent"`` if there is no such file."""
        return file_stamp(self.path(source))


@dataclass(frozen=True)
class BadImage:
    """One unreadable image: its index in the split, its name and why it can't be used."""

    index: int
    name: str
    reason: str


@dataclass(frozen=True)
class VerificationReport:
    """What :func:`verify` found.

    Attributes:
        checked: How many images were decoded.
        bad: The unreadable ones, by index.
    """

    checked: int
    bad: tuple[BadImage, ...] = ()

    def __str__(self) -> str:
        if not self.bad:
            return f"{self.checked} images checked, all readable"
        examples = "; ".join(f"{b.name} ({b.reason})" for b in self.bad[:10])
        more = f"; and {len(self.bad) - 10} more" if len(self.bad) > 10 else ""
        return f"{len(self.bad)} of {self.checked} images can't be read: {examples}{more}"


def verify(
    dataset: ImageDataset, indices: Iterable[int] | None = None, workers: int | None = None
) -> VerificationReport:
    """Decode images once and report the unreadable ones, without keeping any.

    Results are remembered in memory by path, size and time of change. JPEG files are decoded at an eighth of
    their size, which still reads every byte of them.

    Args:
        dataset: What to check.
        indices: Which samples; all of them if None.
        workers: Threads; the machine's cores (at most 8) if None.
    """
    chosen = list(range(len(dataset)) if indices is None else indices)
    threads = workers or min(8, os.cpu_count() or 1)

    def check(part: list[int]) -> list[BadImage]:
        bad = []
        for index in part:
            source = dataset.samples[index].source
            reason = dataset.reader.check(source)
            if reason:
                bad.append(BadImage(index, str(source), reason))
        return bad

    # One task for each thread: a task for each image would cost more than looking at a drawn one.
    parts = [chosen[start::threads] for start in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        bad_images = [bad for part in pool.map(check, parts) for bad in part]

    return VerificationReport(len(chosen), tuple(sorted(bad_images, key=lambda bad: bad.index)))


def drop_bad(
    dataset: ImageDataset, policy: BadImagePolicy, max_share: float, report: VerificationReport | None = None
) -> ImageDataset:
    """Return the data set without its unreadable images, named in a warning and ``info["skipped"]``.

    Args:
        dataset: What to clean.
        policy: ``"skip"`` leaves bad images out; ``"error"`` refuses the data set.
        max_share: Largest share of bad images, in [0, 1], that may be skipped.
        report: What :func:`verify` said, if it was called already.

    Raises:
        DataError: Under ``"error"``, or if more than ``max_share`` can't be read; names the files.
    """
    report = verify(dataset) if report is None else report
    if not report.bad:
        return dataset

    refuse_if_fatal(dataset.name, dataset.split, report, policy, max_share, len(dataset))
    bad = {b.index for b in report.bad}
    names = [*dataset.info.get("skipped", []), *(b.name for b in report.bad)]
    readable = [i for i in range(len(dataset)) if i not in bad]

    return dataset.subset(readable, skipped=names)


def refuse_if_fatal(
    name: str, split: str, report: VerificationReport, policy: BadImagePolicy, max_share: float, total: int
) -> None:
    """Raise if bad images are fatal, warn if they are skipped (see :func:`drop_bad`)."""
    if not report.bad:
        return
    if policy == "error":
        raise DataError(f"{name} ({split}): {report}. Mend or remove them, or pass on_bad_image='skip'.")
    if len(report.bad) > max_share * total:
        raise DataError(
            f"{name} ({split}): {report}. That is {len(report.bad) / max(total, 1):.1%} of {total}, more "
            f"than the {max_share:.1%} that may be skipped (max_bad_share)."
        )
    warnings.warn(f"{name} ({split}): {report}. They are skipped.", stacklevel=4)


def file_stamp(path: Path) -> str:
    """Return the size in bytes and the modification time in ns of a file, ``"absent"`` if there is none."""
    try:
        status = path.stat()
    except OSError:
        return "absent"
    return f"{status.st_size}:{status.st_mtime_ns}"


def decode(data: bytes, name: str, max_pixels: int = MAX_PIXELS, quick: bool = False) -> Image.Image:
    """Decode an image's bytes as :func:`read_image` does; ``quick`` only walks them.

    Raises:
        UndecodableError: If they are no image; names ``name`` and the reason.
    """
    with _opened(io.BytesIO(data), Path(name), max_pixels) as image:
        return _walked(image) if quick else _upright(image)


def _verdict(path: Path, max_pixels: int) -> str:
    """Return why a file can't be decoded, empty if it can."""
    try:
        stat = _stat(path)
    except OSError as error:
        return "does not exist" if isinstance(error, FileNotFoundError) else str(error.strerror)

    if stat not in _verdicts:
        try:
            with _opened(path, path, max_pixels) as image:
                _walked(image)
            _verdicts[stat] = ""
        except UndecodableError as error:
            _verdicts[stat] = error.reason

    return _verdicts[stat]


class UndecodableError(DataError):
    """An image that can't be decoded; ``reason`` says why, without its name."""

    def __init__(self, path: Path, reason: str) -> None:
        self.reason = reason
        super().__init__(f"can't read the image {path}: {reason}.")


@contextmanager
def _opened(source: Path | io.BytesIO, path: Path, max_pixels: int) -> Iterator[Image.Image]:
    """Open an image whose header is harmless; whatever fails until it is closed becomes one sentence with its name."""
    try:
        with Image.open(source) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise UndecodableError(
                    path, f"its header claims {width} x {height} pixels, more than {max_pixels:,}"
                )
            if max(width, height) > MAX_ASPECT * min(width, height):
                raise UndecodableError(path, f"its sides are too unequal: {width} x {height} pixels")
            yield image
    except UndecodableError:
        raise
    # Decoders raise OSError, SyntaxError, struct.error, zlib.error and others at damaged bytes.
    except Exception as error:
        raise UndecodableError(path, _reason(path, error)) from None


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    return to_rgb(ImageOps.exif_transpose(image))


def _walked(image: Image.Image) -> Image.Image:
    """Decode at an eighth of the size, where the format can: damage shows all the same."""
    image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))
    image.load()
    return image


def _frames_note(image: Image.Image) -> str:
    try:
        frames = getattr(image, "n_frames", 1)
    except Exception:  # counting walks the frames; the first one, which was asked for, is whole
        return "animated, but not all frames can be read: only the first was looked at"
    return f"animated: only the first of {frames} frames was looked at" if frames > 1 else ""


def _mode_note(mode: str) -> str:
    return f"converted to 8-bit RGB from {mode}" if mode == "CMYK" or mode.startswith(("I", "F")) else ""


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "the file does not exist"
    if path.is_file() and path.stat().st_size == 0:
        return "the file is empty"
    if type(error).__name__ == "UnidentifiedImageError":
        return "it is no image in a known format"
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def to_rgb(image: Image.Image) -> Image.Image:
    """Return a decoded image of any mode as 8-bit RGB: white under transparency, more than 8 bits scaled."""
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_bytes(np.asarray(image))).convert("RGB")

    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")

    return image.convert("RGB")


def pixel_key(image: Image.Image) -> str:
    """Return 32 hex digits of an RGB image's size and pixels: equal for equal images, however they are stored."""
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()[:32]


def _to_bytes(grey: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Scale (H, W) greys of more than 8 bits to bytes; Pillow's own conversion would clip them at 255."""
    if grey.dtype.kind == "f":
        grey = np.nan_to_num(grey) * (255.0 if np.nanmax(grey) <= 1.0 else 1.0)
        return np.clip(np.round(grey), 0, 255).astype(np.uint8)
    if grey.dtype.itemsize > 2 and grey.max() <= 255:
        return np.clip(grey, 0, 255).astype(np.uint8)
    return (np.clip(grey, 0, 65535) // 257).astype(np.uint8)


def _stat(path: Path) -> _Stat:
    status = path.stat()
    return str(path), status.st_size, status.st_mtime_ns
