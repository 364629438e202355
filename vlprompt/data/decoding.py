"""One image from a file or from bytes: how it is decoded, and why it can't be, in one sentence with its name."""

from __future__ import annotations

import errno
import io
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from vlprompt.core.errors import DataError
from vlprompt.core.names import printable
from vlprompt.core.paths import user_path
from vlprompt.core.pixels import is_deep, orientation, range_of, to_rgb
from vlprompt.data.deep import DeepColours, deep_colours

__all__ = [
    "DEFAULT_DECODING",
    "MAX_ASPECT",
    "MAX_PIXELS",
    "Decoding",
    "FileStatus",
    "Limits",
    "UndecodableError",
    "decode",
    "file_kind",
    "file_status",
    "os_reason",
    "read_image",
    "read_with_note",
    "upright",
    "walk_bytes",
    "walk_file",
]

# Pillow's own bound: 512 MiB of RGB. A header that claims more is treated as an attack.
MAX_PIXELS = 178_956_970
# JPEGs above it, such as photographs of 108 megapixels, are decoded at half their size.
_HALVED_ABOVE = 89_478_485
# A line of one pixel by a million is a small file, but huge after its shorter side is enlarged to a tower's input.
MAX_ASPECT = 500
Limits = tuple[float, float] | None
FileStatus = tuple[str, int, int]
"""Path, bytes, modification time in ns: while they are equal, a file is not read again."""

# Formats that Pillow decodes by itself: others call programs or read what is no raster image.
_FORMATS = (
    "AVIF", "BMP", "DIB", "GIF", "HEIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP",
)  # fmt: skip
_HEIF_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")

# Large photographs are read on purpose; Pillow would call each one a possible attack.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@dataclass(frozen=True)
class Decoding:
    """How image files become pixels.

    Attributes:
        max_pixels: Largest declared width x height, up to :data:`MAX_PIXELS`; checked before any pixel is decoded.
        value_range: What becomes black and white in greys of more than 8 bits; None for what is declared or measured.
        jpeg_side: A JPEG is decoded at the smallest of 1/2, 1/4 and 1/8 of its size whose shorter side has at least so
            many pixels, about twice as fast; 0 decodes it whole.
    """

    max_pixels: int = MAX_PIXELS
    value_range: Limits = None
    jpeg_side: int = 0

    @property
    def key(self) -> str:
        """What a content key says of the options that change pixels; empty for the defaults."""
        limits = "" if self.value_range is None else f";{self.value_range[0]:g}..{self.value_range[1]:g}"
        return limits + (f";side={self.jpeg_side}" if self.jpeg_side else "")


DEFAULT_DECODING = Decoding()


def read_image(path: str | os.PathLike[str], decoding: Decoding = DEFAULT_DECODING) -> Image.Image:
    """Decode an image file to 8-bit RGB, upright.

    EXIF orientation is applied, the first frame of an animation is taken, transparency is laid on white,
    greys of more than 8 bits are scaled (see :func:`vlprompt.core.pixels.range_of`), CMYK and palettes are converted.
    A JPEG of more than 89 megapixels is decoded at half its width and height.

    Args:
        path: The file.
        decoding: Limits and ranges.

    Raises:
        DataError: If the file is missing, no regular file, truncated, too large, a thread of pixels or no image; names
            the file and the reason.
    """
    with _opened(user_path(path), user_path(path), decoding.max_pixels) as image:
        return upright(image, decoding)


def read_with_note(path: str | os.PathLike[str]) -> tuple[Image.Image, str]:
    """Decode an image file as :func:`read_image` does, and say what the decoded pixels don't show.

    Returns:
        The image, and a note of further frames, other colours or more depth; empty if there is none of that.

    Raises:
        DataError: As :func:`read_image` does.
    """
    with _opened(user_path(path), user_path(path), MAX_PIXELS) as image:
        colours = deep_colours(image)
        rgb = upright(image) if colours is None else colours.to_rgb()
        return rgb, "; ".join(filter(None, (_frames_note(image), _mode_note(image, colours))))


def decode(data: bytes, name: str, decoding: Decoding = DEFAULT_DECODING) -> Image.Image:
    """Decode an image's bytes as :func:`read_image` does.

    Raises:
        UndecodableError: If they are no image; names ``name`` and the reason.
    """
    with _opened(io.BytesIO(data), Path(name), decoding.max_pixels) as image:
        return upright(image, decoding)


def walk_bytes(data: bytes, name: str, decoding: Decoding = DEFAULT_DECODING) -> str:
    """Decode an image's bytes without keeping it, and return a note (see :meth:`Reader.note`).

    Raises:
        UndecodableError: If they are no image; names ``name`` and the reason.
    """
    with _opened(io.BytesIO(data), Path(name), decoding.max_pixels) as image:
        return _walked(image, decoding.value_range)


def walk_file(path: Path, decoding: Decoding = DEFAULT_DECODING) -> str:
    """Decode an image file without keeping it, and return a note (see :meth:`Reader.note`).

    Raises:
        UndecodableError: If it is no image; names it and the reason.
    """
    with _opened(path, path, decoding.max_pixels) as image:
        return _walked(image, decoding.value_range)


def upright(image: Image.Image, decoding: Decoding = DEFAULT_DECODING) -> Image.Image:
    """Return an opened image as :func:`read_image` does; what it was decoded to already is taken."""
    colours = deep_colours(image)
    if colours is not None:
        return colours.to_rgb(decoding.value_range)
    if image.format in ("JPEG", "MPO"):
        halved = image.width * image.height > _HALVED_ABOVE
        parts = 2 if halved else 1
        if decoding.jpeg_side:
            parts = max(parts, min(image.size) // decoding.jpeg_side)
        if parts > 1:
            image.draft(image.mode, (image.width // parts, image.height // parts))
    image.load()
    return to_rgb(image, decoding.value_range)


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
            file_status(source)  # a pipe would be waited for without end
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
        return os_reason(error)
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


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


def file_status(path: Path) -> FileStatus:
    """Return what tells one state of a regular file from another. Raises OSError if it is none."""
    try:
        status = path.stat()
    except ValueError:
        raise OSError(errno.EINVAL, "its name holds a null character") from None
    kind = file_kind(status.st_mode)
    if kind:
        raise OSError(errno.EINVAL, f"it is {kind}, not a regular file")
    return str(path), status.st_size, status.st_mtime_ns


def os_reason(error: OSError) -> str:
    """Return what the system says, in words that a user reads."""
    if error.errno == errno.ELOOP:
        return "it is a symbolic link that leads to itself"
    return str(error.strerror or error)


def _shown(path: Path) -> str:
    return printable(str(path))
