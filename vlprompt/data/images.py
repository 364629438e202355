"""Images from files: robust decoding, content keys, and a check that finds unreadable images early.

Images are decoded in threads and processes, where the user sees no traceback, so a damaged file becomes one sentence
with its name. :func:`verify` decodes every image of a split once, before any worker starts: which images are used is
then the same in every process.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import stat
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

from PIL import Image, UnidentifiedImageError

from vlprompt.core.errors import DataError
from vlprompt.core.names import printable
from vlprompt.core.paths import user_path
from vlprompt.data.base import ImageDataset, Reader
from vlprompt.data.deep import DeepColours, deep_colours
from vlprompt.data.pixels import is_deep, orientation, range_of, to_rgb

__all__ = [
    "EXTENSIONS",
    "BadImage",
    "FileReader",
    "SkipLimits",
    "UndecodableError",
    "VerificationReport",
    "decode",
    "drop_bad",
    "file_key",
    "file_kind",
    "file_stamp",
    "pixel_key",
    "read_image",
    "read_with_note",
    "refuse_if_fatal",
    "to_rgb",
    "upright",
    "verify",
    "walk_bytes",
]

EXTENSIONS = (
    ".bmp", ".apng", ".avif", ".dib", ".gif", ".heic", ".heif", ".hif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg",
    ".jpf", ".jpg", ".jpx", ".pbm", ".pfm", ".pgm", ".png", ".pnm", ".ppm", ".qoi", ".tga", ".tif", ".tiff", ".webp",
)  # fmt: skip
# Pillow's own bound: 512 MiB of RGB. A header that claims more is treated as an attack.
MAX_PIXELS = 178_956_970
# JPEGs above it, such as photographs of 108 megapixels, are decoded at half their size.
_HALVED_ABOVE = 89_478_485
# A line of one pixel by a million is a small file, but huge after its shorter side is enlarged to a tower's input.
MAX_ASPECT = 500
BadImagePolicy = Literal["skip", "error"]
Limits = tuple[float, float] | None

# Formats that Pillow decodes by itself: others call programs or read what is no raster image.
_FORMATS = (
    "AVIF", "BMP", "DIB", "GIF", "HEIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP",
)  # fmt: skip
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")

# Path, bytes, modification time in ns: while they are equal, a file is not read again.
_Stat = tuple[str, int, int]
_digests: dict[_Stat, str] = {}
_verdicts: dict[tuple[_Stat, int, Limits], tuple[str, str]] = {}

# Large photographs are read on purpose; Pillow would call each one a possible attack.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def read_image(
    path: str | os.PathLike[str],
    max_pixels: int = MAX_PIXELS,
    value_range: Limits = None,
    jpeg_side: int = 0,
) -> Image.Image:
    """Decode an image file to 8-bit RGB, upright.

    EXIF orientation is applied, the first frame of an animation is taken, transparency is laid on white,
    greys of more than 8 bits are scaled (see :func:`vlprompt.data.pixels.range_of`), CMYK and palettes are converted.
    A JPEG of more than 89 megapixels is decoded at half its width and height.

    Args:
        path: The file.
        max_pixels: Largest declared width x height, up to :data:`MAX_PIXELS`; checked before any pixel is decoded.
        value_range: What becomes black and white in greys of more than 8 bits; None for what is declared or measured.
        jpeg_side: A JPEG is decoded at the smallest of 1/2, 1/4 and 1/8 of its size whose shorter side has at least so
            many pixels, about twice as fast; 0 decodes it whole.

    Raises:
        DataError: If the file is missing, no regular file, truncated, too large, a thread of pixels or no image; names
            the file and the reason.
    """
    with _opened(user_path(path), user_path(path), max_pixels) as image:
        return upright(image, value_range, jpeg_side)


def read_with_note(path: str | os.PathLike[str], max_pixels: int = MAX_PIXELS) -> tuple[Image.Image, str]:
    """Decode an image file as :func:`read_image` does, and say what the decoded pixels don't show.

    Returns:
        The image, and a note of further frames, other colours or more depth; empty if there is none of that.

    Raises:
        DataError: As :func:`read_image` does.
    """
    with _opened(user_path(path), user_path(path), max_pixels) as image:
        colours = deep_colours(image)
        rgb = upright(image) if colours is None else colours.to_rgb()
        return rgb, "; ".join(filter(None, (_frames_note(image), _mode_note(image, colours))))


@dataclass(frozen=True)
class FileReader(Reader):
    """Reads images below one folder; a source is a path relative to it, with ``/``.

    Attributes:
        root: The folder.
        max_pixels: See :func:`read_image`.
        value_range: See :func:`read_image`.
        jpeg_side: See :func:`read_image`.
    """

    root: Path
    max_pixels: int = MAX_PIXELS
    value_range: Limits = None
    jpeg_side: int = 0

    def with_jpeg_side(self, side: int) -> FileReader:
        """See :meth:`Reader.with_jpeg_side`."""
        return replace(self, jpeg_side=side)

    def path(self, source: str) -> Path:
        """Return where a source lies."""
        return self.root / source

    def read(self, source: str) -> Image.Image:
        """Return the image as RGB (see :func:`read_image`)."""
        return read_image(self.path(source), self.max_pixels, self.value_range, self.jpeg_side)

    def check(self, source: str) -> str:
        """Return why an image can't be decoded, empty if it can; remembered like :meth:`key`."""
        return _verdict(self.path(source), self.max_pixels, self.value_range)[0]

    def note(self, source: str) -> str:
        """See :meth:`Reader.note`."""
        return _verdict(self.path(source), self.max_pixels, self.value_range)[1]

    def key(self, source: str) -> str:
        """Return ``file:`` and the sha256 of the bytes; remembered until size or time of change differ."""
        path = self.path(source)
        try:
            status = _stat(path)
            if status not in _digests:
                _digests[status] = file_key(path.read_bytes())
        except OSError as error:
            raise DataError(f"can't read the image {_shown(path)}: {_os_reason(error)}.") from None

        return _digests[status] + _decoding_key(self.value_range, self.jpeg_side)

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
        notes: What decoding changes of readable ones (see :meth:`Reader.note`), and of how many.
    """

    checked: int
    bad: tuple[BadImage, ...] = ()
    notes: tuple[tuple[str, int], ...] = ()

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
        workers: Threads; the machine's cores (at most 8) if None. They are no loading workers: a look at a file is
            cheap, the decoder leaves the interpreter to others, and what it finds is remembered in this process.
    """
    chosen = list(range(len(dataset)) if indices is None else indices)
    threads = workers or min(8, os.cpu_count() or 1)

    def check(part: list[int]) -> tuple[list[BadImage], Counter[str]]:
        bad = []
        notes: Counter[str] = Counter()
        for index in part:
            source = dataset.samples[index].source
            reason = dataset.reader.check(source)
            if reason:
                bad.append(BadImage(index, printable(str(source)), reason))
            elif note := dataset.reader.note(source):
                notes[note] += 1
        return bad, notes

    # One task for each thread: a task for each image would cost more than looking at a drawn one.
    parts = [chosen[start::threads] for start in range(threads)]
    bad_images: list[BadImage] = []
    counts: Counter[str] = Counter()
    with ThreadPoolExecutor(threads) as pool:
        for bad, notes in pool.map(check, parts):
            bad_images += bad
            counts += notes

    in_order = sorted(bad_images, key=lambda bad: bad.index)
    return VerificationReport(len(chosen), tuple(in_order), tuple(sorted(counts.items())))


def drop_bad(
    dataset: ImageDataset,
    policy: BadImagePolicy,
    max_share: float,
    report: VerificationReport | None = None,
    max_images: int = 0,
) -> ImageDataset:
    """Return the data set without its unreadable images, named in a warning and ``info["skipped"]``.

    Args:
        dataset: What to clean.
        policy: ``"skip"`` leaves bad images out; ``"error"`` refuses the data set.
        max_share: Largest share of bad images, in [0, 1], that may be skipped.
        report: What :func:`verify` said, if it was called already.
        max_images: See :class:`SkipLimits`.

    Raises:
        DataError: Under ``"error"``, or if more can't be read than may be skipped; names the files.
    """
    report = verify(dataset) if report is None else report
    if report.notes:
        listing = "; ".join(f"{note} ({count} images)" for note, count in report.notes[:3])
        more = f"; and {len(report.notes) - 3} other ranges" if len(report.notes) > 3 else ""
        warnings.warn(
            f"{dataset.name} ({dataset.split}): {listing}{more}. To set the range: value_range=[LOW, HIGH].",
            stacklevel=3,
        )
    if not report.bad:
        return dataset

    limits = SkipLimits(max_share, max_images)
    refuse_if_fatal(dataset.name, dataset.split, report, policy, limits, len(dataset))
    bad = {b.index for b in report.bad}
    names = [*dataset.info.get("skipped", []), *(b.name for b in report.bad)]
    readable = [i for i in range(len(dataset)) if i not in bad]

    return dataset.subset(readable, skipped=names)


@dataclass(frozen=True)
class SkipLimits:
    """How many unreadable images of a split may be skipped.

    Attributes:
        share: Share of the split, in [0, 1]; 0 allows none.
        images: So many may be skipped whatever their share, since one image of a small split is a large share; but
            never half of the split.
    """

    share: float
    images: int = 0

    def allow(self, bad: int, total: int) -> bool:
        """Return whether ``bad`` of ``total`` images may be skipped."""
        return bad <= self.share * total or (self.share > 0 and bad <= self.images and 2 * bad < total)


def refuse_if_fatal(
    name: str, split: str, report: VerificationReport, policy: BadImagePolicy, limits: SkipLimits, total: int
) -> None:
    """Raise if bad images are fatal, warn if they are skipped (see :func:`drop_bad`)."""
    if not report.bad:
        return
    if policy == "error":
        raise DataError(f"{name} ({split}): {report}. Mend or remove them, or pass on_bad_image='skip'.")
    if not limits.allow(len(report.bad), total):
        raise DataError(
            f"{name} ({split}): {report}. That is {len(report.bad) / max(total, 1):.1%} of {total}, more "
            f"than the {limits.share:.1%} (max_bad_share) and the {limits.images} images (max_bad_images, of less than "
            "half a split) that may be skipped. Mend or remove them, or raise one of the two."
        )
    warnings.warn(f"{name} ({split}): {report}. They are skipped.", stacklevel=4)


def file_key(data: bytes, value_range: Limits = None, jpeg_side: int = 0) -> str:
    """Return the content key of a file's bytes: ``file:``, their sha256, and what a user set for decoding them."""
    return f"file:{hashlib.sha256(data).hexdigest()}{_decoding_key(value_range, jpeg_side)}"


def _decoding_key(value_range: Limits, jpeg_side: int) -> str:
    limits = "" if value_range is None else f";{value_range[0]:g}..{value_range[1]:g}"
    return limits + (f";side={jpeg_side}" if jpeg_side else "")


def file_stamp(path: Path) -> str:
    """Return the size in bytes and the modification time in ns of a file, ``"absent"`` if there is none."""
    try:
        status = path.stat()
    except OSError:
        return "absent"
    return f"{status.st_size}:{status.st_mtime_ns}"


def file_kind(mode: int) -> str:
    """Return what an entry of a folder is, by the mode of its status; empty for a regular file."""
    kinds = (
        (stat.S_ISREG, ""),
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    )
    return next((kind for test, kind in kinds if test(mode)), "no regular file")


def walk_bytes(data: bytes, name: str, max_pixels: int = MAX_PIXELS, value_range: Limits = None) -> str:
    """Decode an image's bytes without keeping it, and return a note (see :meth:`Reader.note`).

    Raises:
        UndecodableError: If they are no image; names ``name`` and the reason.
    """
    with _opened(io.BytesIO(data), Path(name), max_pixels) as image:
        return _walked(image, value_range)


def decode(
    data: bytes,
    name: str,
    max_pixels: int = MAX_PIXELS,
    value_range: Limits = None,
    jpeg_side: int = 0,
) -> Image.Image:
    """Decode an image's bytes as :func:`read_image` does.

    Raises:
        UndecodableError: If they are no image; names ``name`` and the reason.
    """
    with _opened(io.BytesIO(data), Path(name), max_pixels) as image:
        return upright(image, value_range, jpeg_side)


def _verdict(path: Path, max_pixels: int, value_range: Limits) -> tuple[str, str]:
    """Return why a file can't be decoded, empty if it can, and what decoding changes."""
    try:
        key = (_stat(path), max_pixels, value_range)
    except OSError as error:
        return "does not exist" if isinstance(error, FileNotFoundError) else _os_reason(error), ""

    if key not in _verdicts:
        try:
            with _opened(path, path, max_pixels) as image:
                _verdicts[key] = "", _walked(image, value_range)
        except UndecodableError as error:
            _verdicts[key] = error.reason, ""

    return _verdicts[key]


class UndecodableError(DataError):
    """An image that can't be decoded; ``reason`` says why, without its name."""

    def __init__(self, path: Path, reason: str) -> None:
        self.reason = reason
        super().__init__(f"can't read the image {_shown(path)}: {reason}.")


@contextmanager
def _opened(source: Path | io.BytesIO, path: Path, max_pixels: int) -> Iterator[Image.Image]:
    """Open an image whose header is harmless; whatever fails until it is closed becomes one sentence with its name."""
    try:
        if isinstance(source, Path):
            _stat(source)  # a pipe would be waited for without end
        with _image_of(source) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise UndecodableError(
                    path,
                    f"its header claims {width} x {height} pixels, more than {max_pixels:,} (max_pixels)",
                )
            if max(width, height) > MAX_ASPECT * min(width, height):
                raise UndecodableError(path, f"its sides are too unequal: {width} x {height} pixels")
            yield image
    except UndecodableError:
        raise
    # Decoders raise OSError, SyntaxError, struct.error, zlib.error, MemoryError and others at damaged bytes.
    except Exception as error:
        raise UndecodableError(path, _reason(path, error)) from None


def _image_of(source: Path | io.BytesIO) -> Image.Image:
    """Return an image whose header was read."""
    try:
        return Image.open(source, formats=_formats())
    except UnidentifiedImageError:
        if not _is_heif(source):
            raise
        try:
            import pillow_heif
        except ImportError:
            raise OSError(
                "it is HEIC, which needs the package pillow-heif (pip install pillow-heif); or save it as JPEG"
            ) from None
        pillow_heif.register_heif_opener()
        return Image.open(source, formats=["HEIF"])


@cache
def _formats() -> list[str]:
    """Return the formats that this Pillow can open of those that we read."""
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


def _is_heif(source: Path | io.BytesIO) -> bool:
    if isinstance(source, Path):
        with source.open("rb") as file:
            head = file.read(12)
    else:
        head = source.getvalue()[:12]
    return head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS


def upright(image: Image.Image, value_range: Limits = None, jpeg_side: int = 0) -> Image.Image:
    """Return an opened image as :func:`read_image` does; what it was decoded to already is taken."""
    colours = deep_colours(image)
    if colours is not None:
        return colours.to_rgb(value_range)
    if image.format in ("JPEG", "MPO"):
        halved = image.width * image.height > _HALVED_ABOVE
        parts = 2 if halved else 1
        if jpeg_side:
            parts = max(parts, min(image.size) // jpeg_side)
        if parts > 1:
            image.draft(image.mode, (image.width // parts, image.height // parts))
    image.load()
    return to_rgb(image, value_range)


def _walked(image: Image.Image, value_range: Limits) -> str:
    """Decode at an eighth of the size, where the format can: damage shows all the same; return a note of the range."""
    colours = deep_colours(image)
    if colours is not None:
        orientation(image)
        return str(colours.range(value_range))

    image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))
    image.load()
    orientation(image)  # as reading does
    return str(range_of(image, value_range)) if is_deep(image.mode) else ""


def _frames_note(image: Image.Image) -> str:
    try:
        frames = getattr(image, "n_frames", 1)
    except Exception:  # counting walks the frames; the first one, which was asked for, is whole
        return "animated, but not all frames can be read: only the first was looked at"
    return f"animated: only the first of {frames} frames was looked at" if frames > 1 else ""


def _mode_note(image: Image.Image, colours: DeepColours | None) -> str:
    if colours is not None:
        return f"converted to 8-bit RGB from 16 bits a channel: {colours.range()}"
    if is_deep(image.mode):
        return f"converted to 8-bit RGB from {image.mode}: {range_of(image)}"
    return f"converted to 8-bit RGB from {image.mode}" if image.mode == "CMYK" else ""


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "the file does not exist"
    if isinstance(error, MemoryError):
        return "there is not enough memory to decode it"
    if isinstance(error, UnidentifiedImageError):
        is_empty = path.is_file() and path.stat().st_size == 0
        return "the file is empty" if is_empty else "it is no image in a known format"
    if isinstance(error, OSError) and error.strerror:
        return _os_reason(error)
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def pixel_key(image: Image.Image) -> str:
    """Return 32 hex digits of an RGB image's size and pixels: equal for equal images, however they are stored."""
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()[:32]


def _stat(path: Path) -> _Stat:
    """Return what tells one state of a regular file from another. Raises OSError if it is none."""
    try:
        status = path.stat()
    except ValueError:
        raise OSError(errno.EINVAL, "its name holds a null character") from None
    kind = file_kind(status.st_mode)
    if kind:
        raise OSError(errno.EINVAL, f"it is {kind}, not a regular file")
    return str(path), status.st_size, status.st_mtime_ns


def _os_reason(error: OSError) -> str:
    """Return what the system says, in words that a user reads."""
    if error.errno == errno.ELOOP:
        return "it is a symbolic link that leads to itself"
    return str(error.strerror or error)


def _shown(path: Path) -> str:
    return printable(str(path))
