"""The native-size step: statistics of an image at its own pixels, of one length whatever size it comes in.

A backdoor trigger is a change of a few pixels or of neighbours' relations. Bringing an image to another size mixes
neighbours, and what is left of such a change then depends on the size. So nothing is enlarged here: statistics are
taken of the pixels as they are stored, with positions as shares of width and height. Of an image that is larger than
:data:`SIDE` a reduced copy shows the whole, and its corners are looked at at their own pixels.

Sources: residuals of several orders and their distribution: Fridrich and Kodovsky, "Rich Models for Steganalysis of
    Digital Images", IEEE TIFS 2012; neighbours' correlation after resampling: Popescu and Farid, "Exposing Digital
    Forgeries by Detecting Traces of Resampling", IEEE TSP 2005. The selection is this library's own.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.fft import dctn

from vlprompt.core.pixels import to_rgb
from vlprompt.data.triggers.base import Pixels

__all__ = ["FORENSICS", "SIDE", "VIEWS", "examined", "pixel_statistics", "statistics_width"]

SIDE = 64
"""Pixels a side up to which an image is looked at as a whole at its own pixels."""

FORENSICS = "+pixels at their own size"
"""What cached rows with these statistics are filed under."""

VIEWS = 5
"""Views of an image: the whole, then its corners from the upper left to the lower right."""

Floats = NDArray[np.float32]

_LEAST = 16  # pixels a side; smaller images are continued by their mirror image
_CHANNELS = np.array(
    [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], np.float32
)
_QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9, 0.97)
_LEVELS = (6, 7, 8, 9, 10, 12, 16)  # of colours that were rounded
_WAVES = 16  # periods over width and height
_WINDOWS = (16, 32)  # pixels a side of blocks whose middle and highest frequency is looked at
_PATCHES = (2, 3, 4, 5, 6)  # pixels a side of squares in corners
_MARGINS = (0, 1, 2, 3)  # pixels between a square and the image's border


def examined(image: Image.Image) -> Floats:
    """Return (VIEWS, 1 + E) of an image of any size: 1 where there is a view, then :func:`pixel_statistics` of it.

    An image of at most :data:`SIDE` pixels a side is the first view, and the others are zeros. A larger one is reduced
    to that size for the first view (bicubic, proportions kept); the other views are its corners at its own pixels,
    SIDE a side or as much as there is.
    """
    image = to_rgb(image)
    views = np.zeros((VIEWS, 1 + statistics_width()), np.float32)
    longer = max(image.size)
    if longer <= SIDE:
        views[0] = [1, *pixel_statistics(np.asarray(image))]
        return views

    width, height = image.size
    reduced = (max(1, round(width * SIDE / longer)), max(1, round(height * SIDE / longer)))
    whole = image.resize(reduced, Image.Resampling.BICUBIC)
    views[0] = [1, *pixel_statistics(np.asarray(whole))]

    pixels = np.asarray(image)
    corners = (pixels[:SIDE, :SIDE], pixels[:SIDE, -SIDE:], pixels[-SIDE:, :SIDE], pixels[-SIDE:, -SIDE:])
    for number, corner in enumerate(corners, 1):
        views[number] = [1, *pixel_statistics(corner)]
    return views


@lru_cache(maxsize=1)
def statistics_width() -> int:
    """Return E, the number of statistics."""
    return len(pixel_statistics(np.zeros((_LEAST, _LEAST, 3), np.uint8)))


def pixel_statistics(pixels: Pixels) -> Floats:
    """Return (E,) statistics of (H, W, 3) pixels, H and W arbitrary.

    Luma and both colour differences: the distribution of residuals of several orders, correlation of neighbours, power
    in an 8 x 8 grid of frequencies, waves along rows and columns, the two frequencies of blocks that FTrojan raises.
    Colours: distribution, distance from grids of few levels. Places: residuals, flatness and colour in cells, squares
    in corners. Sizes are logarithms.
    """
    missing = [max(0, _LEAST - side) for side in pixels.shape[:2]]
    if any(missing):
        pixels = np.pad(pixels, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="symmetric")

    colours = pixels.astype(np.float32)
    channels = np.ascontiguousarray(
        (colours @ _CHANNELS.T).transpose(2, 0, 1)
    )  # luma, then colour differences
    parts: list[Any] = []
    for channel in channels:
        parts += _residual_statistics(channel)
        parts.append(_spectrum(channel))
    parts += [_waves(channels[0]), *(_block_frequencies(channel) for channel in channels[1:])]
    parts += [_colours(pixels), _cells(channels[0], colours), _squares(colours)]
    return np.concatenate(parts).astype(np.float32)


def _log(values: Any) -> Any:
    return np.log(np.asarray(values) + 0.1)


def _residual_statistics(channel: Floats) -> list[Any]:
    """Return the distribution of residuals of one channel, and the correlation of neighbouring steps."""
    across = np.diff(channel, axis=1)
    down = np.diff(channel, axis=0)
    bend_across = np.diff(across, axis=1)
    bend_down = np.diff(down, axis=0)
    residuals = (
        across,
        down,
        bend_across,
        bend_down,
        np.diff(across, axis=0),
        np.diff(bend_across, axis=1),
        np.diff(bend_down, axis=0),
        np.diff(np.diff(bend_across, axis=0), axis=0),
    )

    parts: list[Any] = []
    for residual in residuals:
        sizes = np.sort(np.abs(residual), axis=None)
        ranks = [round(q * (len(sizes) - 1)) for q in _QUANTILES]
        zeros = np.searchsorted(sizes, 0.5) / len(sizes)
        parts.append(_log([*sizes[ranks], sizes.mean(), np.sqrt(np.square(sizes).mean())]))
        parts.append([zeros])

    # Resampling makes neighbouring steps alike.
    for lag in (1, 2, 3):
        parts.append([_correlation(across[:, lag:], across[:, :-lag]), _correlation(down[lag:], down[:-lag])])
    return parts


def _correlation(first: Floats, second: Floats) -> float:
    product = float((first * second).mean())
    return product / (float(np.sqrt(np.square(first).mean() * np.square(second).mean())) + 0.1)


def _spectrum(channel: Floats, bins: int = 8) -> Any:
    """Return mean and largest power of the DCT in a grid of frequencies, 2 bins^2 logarithms."""
    power = np.square(dctn(channel - channel.mean(), norm="ortho"))
    rows = _edges(power.shape[0], bins)
    columns = _edges(power.shape[1], bins)
    mean = _mean_of(power, rows, columns)
    largest = np.maximum.reduceat(np.maximum.reduceat(power, rows, axis=0), columns, axis=1)
    return _log(np.concatenate([mean.ravel(), largest.ravel()]))


def _waves(luma: Floats) -> Any:
    """Return the size of sine waves along the rows and along the columns, averaged over the other direction."""
    parts = []
    for axis in (0, 1):
        line = luma.mean(axis)
        sizes = 2 * np.abs(np.fft.rfft(line - line.mean()))[1 : _WAVES + 1] / len(line)
        parts.append(_log(np.pad(sizes, (0, _WAVES - len(sizes)))))
    return np.concatenate(parts)


def _block_frequencies(channel: Floats) -> Any:
    """Return how far the middle and the highest frequency of blocks stand out, with sign."""
    values = []
    for window in _WINDOWS:
        side = min(window, *channel.shape)
        down = channel.shape[0] // side
        across = channel.shape[1] // side
        blocks = channel[: side * down, : side * across].reshape(down, side, across, side)
        spectrum = dctn(blocks, axes=(1, 3), norm="ortho").mean(axis=(0, 2))
        for k in (side // 2 - 1, side - 1):
            around = np.abs(spectrum[k - 2 : k + 3, k - 2 : k + 3]).mean()
            values += [float(spectrum[k, k]) / 30, float(spectrum[k, k]) / (float(around) + 1)]
    return np.array(values)


def _colours(pixels: Pixels) -> Any:
    """Return how colours are distributed, and how near they lie to grids of few levels."""
    counts = np.stack([np.bincount(pixels[..., c].ravel(), minlength=256) for c in range(3)]).astype(
        np.float64
    )
    share = counts.sum(0) / counts.sum()
    values = np.arange(256)
    parts = []
    for levels in _LEVELS:
        step = 255 / (levels - 1)
        distance = np.abs(values - np.round(values / step) * step)
        parts.append(float(share @ distance) / (step / 4))
        parts.append(float(share @ (distance < 0.6)))

    pixel_count = pixels.shape[0] * pixels.shape[1]
    distinct = (counts > 0).sum(1) / min(256, pixel_count)
    below = np.cumsum(counts, axis=1) / pixel_count
    quantiles = np.stack([(below < q).sum(1) for q in (0.001, 0.02, 0.25, 0.5, 0.75, 0.98, 0.999)]) / 255
    flat = [float((np.diff(pixels, axis=axis) == 0).all(-1).mean()) for axis in (0, 1)]
    return np.concatenate([parts, distinct, quantiles.ravel(), flat])


def _cells(luma: Floats, colours: Floats) -> Any:
    """Return what differs from place to place: sharpness, flatness, saturation and colour in cells."""
    across = np.abs(np.diff(luma, axis=1))
    down = np.abs(np.diff(luma, axis=0))
    fine_across = np.abs(np.diff(luma, 3, axis=1))
    fine_down = np.abs(np.diff(luma, 3, axis=0))
    both = np.abs(np.diff(np.diff(luma, axis=0), axis=1))
    fine_both = np.abs(np.diff(np.diff(luma, 2, axis=0), 2, axis=1))

    parts = []
    # How sharp: fine steps beside coarse ones. A warp blurs in some places more than in others.
    for fine, coarse in ((fine_across, across), (fine_down, down), (fine_both, both)):
        sharp = _log(_grid(fine, 4)) - _log(_grid(coarse, 4))
        ordered = np.sort(_log(_grid(fine, 6)) - _log(_grid(coarse, 6)), axis=None)
        parts += [sharp.ravel(), ordered[[0, 2, 5, 9, 17, 26, 30, 33, 35]]]

    flat = (across[:-1] < 0.5) & (down[:, :-1] < 0.5)
    parts += [_grid(flat.astype(np.float32), 4).ravel(), _log(_grid(across, 4)).ravel()]
    saturation = colours.max(-1) - colours.min(-1)
    parts.append(_grid(saturation, 4).ravel() / 255)
    parts += [_grid(colours[..., c], 8).ravel() / 255 for c in range(3)]
    return np.concatenate(parts)


def _grid(values: Floats, cells: int) -> Any:
    """Return (cells, cells) means; cells are shares of height and width."""
    return _mean_of(values, _edges(values.shape[0], cells), _edges(values.shape[1], cells))


def _edges(length: int, parts: int) -> Any:
    """Return where each of several parts of a line begins."""
    return np.arange(parts) * length // parts


def _mean_of(values: Any, rows: Any, columns: Any) -> Any:
    sums = np.add.reduceat(np.add.reduceat(values, rows, axis=0), columns, axis=1)
    heights = np.diff(np.append(rows, values.shape[0]))
    widths = np.diff(np.append(columns, values.shape[1]))
    return sums / np.outer(heights, widths)


def _squares(colours: Floats) -> Any:
    """Return how much small squares in the corners stand out from what surrounds them.

    For every corner and side, at the border: spread inside, spread of the ring of two pixels around, and distance of
    their means; and the largest ratio of distance to spreads over all sides, for every distance from the border.
    """
    height, width = colours.shape[:2]
    stacked = np.concatenate([colours, np.square(colours)], axis=-1).astype(np.float64)
    table = np.zeros((height + 1, width + 1, 6))
    table[1:, 1:] = stacked.cumsum(0).cumsum(1)

    side, margin, low, right = _squares_of()
    top = np.where(low, height - margin - side, margin)
    left = np.where(right, width - margin - side, margin)
    inner = _box(table, top, left, top + side, left + side)
    outer_top = np.maximum(0, top - 2)
    outer_left = np.maximum(0, left - 2)
    bottom = np.minimum(height, top + side + 2)
    end = np.minimum(width, left + side + 2)
    outer = _box(table, outer_top, outer_left, bottom, end)

    area = (side * side)[:, None]
    around = ((bottom - outer_top) * (end - outer_left))[:, None] - area
    mean, spread = _moments(inner, area)
    ring_mean, ring_spread = _moments(outer - inner, around)
    distance = np.sqrt(np.square(mean - ring_mean).mean(1))
    ratio = _log(distance / (spread + ring_spread + 3)).reshape(4, len(_MARGINS), len(_PATCHES))

    at_border = margin == 0
    figures = [_log(values[at_border]) for values in (spread, ring_spread, distance)]
    return np.concatenate([*figures, mean[at_border].ravel() / 255, ratio.max(2).ravel()])


@lru_cache(maxsize=1)
def _squares_of() -> tuple[Any, Any, Any, Any]:
    """Return side, margin, and whether it lies below and on the right, of every square that is looked at."""
    rows = [
        (side, margin, low, right)
        for low in (False, True)
        for right in (False, True)
        for margin in _MARGINS
        for side in _PATCHES
    ]
    side, margin, low, right = (np.array(column) for column in zip(*rows, strict=True))
    return side, margin, low, right


def _box(table: Any, top: Any, left: Any, bottom: Any, right: Any) -> Any:
    """Return (n, 6) sums over boxes, from a table of sums over everything above and to the left."""
    return table[bottom, right] - table[top, right] - table[bottom, left] + table[top, left]


def _moments(sums: Any, area: Any) -> tuple[Any, Any]:
    """Return the (n, 3) mean colour and the (n,) spread of boxes."""
    mean = sums[:, :3] / area
    variance = np.maximum(0, sums[:, 3:] / area - np.square(mean))
    return mean, np.sqrt(variance.mean(1))
