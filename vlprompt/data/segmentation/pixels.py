"""What the pixels of a mask file say: class numbers, or how far each is from black and from transparent.

Two kinds of files look alike and mean different things. A mask of class numbers is read by its stored numbers, also
where a palette paints them. A binary mask is read by what one sees: the colours of its palette, or its transparency
where all of it has one colour. Where the two readings of a file differ, it is an error that names both.
"""

from __future__ import annotations

import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from vlprompt.core.errors import DataError
from vlprompt.data.decoding import MAX_PIXELS, UndecodableError

__all__ = ["open_mask", "orientation", "raw_values", "seen_values"]

Values = NDArray[Any]
_ORIENTATION = 0x0112  # EXIF's tag
_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")


def open_mask(path: Path) -> Image.Image:
    """Return a decoded mask, upright as images are read.

    Raises:
        DataError: If the file is missing, no regular file, damaged, too large, or holds several images.
    """
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise UndecodableError(path, "it is no regular file")
        with Image.open(path) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise DataError(f"the mask {path} claims {opened.width} x {opened.height} pixels.")
            frames = int(getattr(opened, "n_frames", 1))
            if frames > 1 and opened.format != "MPO":
                raise DataError(
                    f"the mask {path} holds {frames} images; a mask is one. Save the one that counts."
                )
            opened.load()
            return ImageOps.exif_transpose(opened)
    except DataError:
        raise
    except FileNotFoundError:
        raise UndecodableError(path, "the mask does not exist") from None
    except Exception as error:  # decoders throw many kinds at damaged bytes
        raise UndecodableError(path, " ".join(str(error).split()).rstrip(".")) from None


def orientation(path: Path) -> int:
    """Return the orientation that an image's EXIF block states, 1 (upright) to 8; 1 where it states none."""
    try:
        with Image.open(path) as image:
            value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # who reads the image says what is wrong with it
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def raw_values(path: Path) -> Values:
    """Return the class numbers that a mask file stores, (H, W), whole numbers of any type; palette files by index.

    Raises:
        DataError: If the file can't be read (see :func:`open_mask`), is coloured, or holds what is no whole number.
    """
    image = open_mask(path)
    if image.mode in ("P", "L", "1") or image.mode.startswith("I"):
        return _whole(path, np.asarray(image))
    if image.mode == "F":
        return _whole(path, np.asarray(image))

    array = np.asarray(_decoded(image))
    colours = array[..., :3]
    if (colours != colours[..., :1]).any():
        raise DataError(
            f"the mask {path} is a colour image. A mask of classes has one channel of class numbers, or a palette; "
            "convert it first."
        )
    numbers = colours[..., 0]
    clear = array[..., 3] == 0
    if clear.any() and (numbers[clear] != 0).any():
        raise DataError(
            f"the mask {path} is transparent where its class numbers are not 0: nothing says which of the two counts. "
            "Save it without transparency."
        )
    return numbers


def seen_values(path: Path, threshold: float | None, ignore: Sequence[int] = ()) -> tuple[Values, Values]:
    """Return how strongly each pixel of a binary mask is marked, (H, W), and the numbers that the file stores, (H, W).

    Args:
        path: The file.
        threshold: What the values will be compared with; None if the file must hold black and one colour.
        ignore: Indices of a palette that don't count.

    Returns:
        Values: 0 is outside. Of a grey file its own numbers; of a coloured one the brightest channel, or without a
        threshold 0 and 1; of one that is transparent in part and of one colour the opacity. Numbers: for values that
        don't count; the index of a palette, else the values.

    Raises:
        DataError: If the file can't be read, or its colours leave open what is inside.
    """
    image = open_mask(path)
    stored = np.asarray(image)
    if (image.mode in ("L", "1", "F") or image.mode.startswith("I")) and "transparency" not in image.info:
        return _checked(path, stored, threshold), stored

    array = np.asarray(_decoded(image))
    colours = array[..., :3]
    void = np.isin(stored, list(ignore)) if image.mode == "P" else np.zeros(colours.shape[:2], bool)
    by_alpha = _by_alpha(path, colours, array[..., 3])
    if by_alpha is not None:
        values: Values = by_alpha
    elif threshold is not None or (colours == colours[..., :1]).all():
        values = colours.max(-1)
    else:
        values = _by_colour(path, colours, void, paletted=image.mode == "P")

    numbers = stored if image.mode == "P" else values
    if image.mode == "P" and threshold is None:
        _check_palette(path, stored[~void], colours[~void])
    return _checked(path, values, threshold), numbers


def _decoded(image: Image.Image) -> Image.Image:
    """Return an image of any mode in RGBA; bytes that stand for other things are converted first."""
    if image.mode in _ALPHA or image.mode in ("RGB", "L", "1", "P"):
        return image.convert("RGBA")
    return image.convert("RGB").convert("RGBA")


def _by_alpha(path: Path, colours: Values, alpha: Values) -> Values | None:
    """Return the opacity if it is the mask, None if the colours are.

    Raises:
        DataError: If both say something, and not the same.
    """
    varies = bool((alpha != alpha.flat[0]).any())
    if not varies and alpha.flat[0] > 0:
        return None

    inside = (colours > 0).any(-1)
    if varies and bool((colours == colours[:1, :1]).all()):
        return alpha
    if bool((inside == (alpha > 0)).all()):
        return None
    raise DataError(
        f"the mask {path} has colours and transparency that differ: {100 * inside.mean():.1f} % of it are not black, "
        f"{100 * (alpha > 0).mean():.1f} % are not transparent. Save the one that is the mask, without the other."
    )


def _by_colour(path: Path, colours: Values, void: Values, *, paletted: bool) -> Values:
    """Return 0 where a coloured mask is black, 1 where it has its one other colour.

    Args:
        path: The file, for messages.
        colours: (H, W, 3).
        void: (H, W), where colours don't count.
        paletted: Whether a palette gives the colours; such a file may be of one colour, all inside.

    Raises:
        DataError: If it has no black, or several other colours.
    """
    flat = _packed(colours)
    kinds = np.unique(flat[~void])
    if (len(kinds) == 2 and kinds[0] == 0) or (len(kinds) <= 1 and paletted):
        return (flat != 0).astype(np.uint8)

    examples = ", ".join(f"#{kind:06x}" for kind in kinds[:6]) + (", ..." if len(kinds) > 6 else "")
    raise DataError(
        f"the mask {path} is a colour image of {len(kinds)} colours ({examples}). A binary mask has black, which is "
        "outside, and one colour. If everything that isn't black is inside, pass threshold=0 (a JPEG needs a larger "
        "one, and loses colours darker than that); if colours are classes, write a mask of class numbers."
    )


def _check_palette(path: Path, indices: Values, colours: Values) -> None:
    """Refuse a palette that gives several of the indices in use one colour: nothing says what they mean then."""
    used = np.unique(indices)
    if len(used) > 1 and len(np.unique(_packed(colours))) < len(used):
        raise DataError(
            f"the mask {path} holds the numbers {', '.join(map(str, used[:6]))}, and its palette gives several of them "
            "one colour. Save it in grey, 0 outside and 255 inside; or name its classes, if the numbers are classes."
        )


def _packed(colours: Values) -> NDArray[np.uint32]:
    """Return (..., 3) colours as one number each."""
    packed = np.zeros(colours.shape[:-1], np.uint32)
    for channel in range(3):
        packed <<= np.uint32(8)
        packed |= colours[..., channel]
    return packed


def _checked(path: Path, values: Values, threshold: float | None) -> Values:
    """Return the values, bytes for booleans.

    Raises:
        DataError: If there are values that can't be a mask's, or that the threshold is not meant for.
    """
    if values.dtype.kind == "b":
        return values.astype(np.uint8)
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise DataError(f"the mask {path} holds values that are no numbers.")
    if values.min() < 0:
        raise DataError(f"the mask {path} holds {values.min()}; values of a mask are not negative.")
    if threshold is None:
        return values

    largest = values.max()
    if values.dtype.kind == "f" and 0 < largest <= 1 <= threshold:
        raise DataError(
            f"the mask {path} holds numbers from 0 to 1, of which threshold={threshold:g} leaves nothing inside. Pass "
            "a threshold below 1, for example threshold=0.5."
        )
    if largest > 255 >= threshold > 0:
        raise DataError(
            f"the mask {path} holds values up to {largest:g}, and threshold={threshold:g} is meant for values up to "
            f"255. Pass a threshold of its own range, for example threshold={int(largest) // 2 + 255}."
        )
    return values


def _whole(path: Path, values: Values) -> Values:
    """Return values as whole numbers, in no larger a type than needed. Raises DataError if they are none."""
    if values.dtype.kind == "b":
        return values.astype(np.uint8)
    if values.dtype.kind in "iu":
        return values

    whole = np.nan_to_num(values.astype(np.float64), nan=0.5, posinf=0.5, neginf=0.5)
    if (whole != np.round(whole)).any():
        raise DataError(f"the mask {path} holds numbers that are no whole ones, so they are no classes.")
    return whole.astype(np.int64)
