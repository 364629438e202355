"""Blur: defocus, frosted glass, motion, zoom and Gaussian (Hendrycks and Dietterich, arXiv 1903.12261, section 4)."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import correlate1d

from vlprompt.data.corruptions import CORRUPTIONS, Values
from vlprompt.data.corruptions._filters import blurred, enlarged, filtered, streaked

__all__ = ["defocus_blur", "gaussian_blur", "glass_blur", "motion_blur", "zoom_blur"]

_SMALL_DISK = 8  # pixels; larger ones are smoothed with five taps in place of three


@CORRUPTIONS.register(
    "defocus_blur",
    summary="a lens out of focus",
    levels=((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
)
def defocus_blur(values: Values, level: tuple[int, float], rng: np.random.Generator) -> Values:
    """Average over a disk of a radius in pixels, whose edge is smoothed by a Gaussian."""
    radius, smoothing = level
    reach = max(radius, _SMALL_DISK)
    places = np.arange(-reach, reach + 1)
    disk = (places[:, None] ** 2 + places**2 <= radius**2).astype(np.float32)
    disk /= disk.sum()

    taps = np.arange(-1, 2) if radius <= _SMALL_DISK else np.arange(-2, 3)
    weights = np.exp(-(taps**2) / (2 * smoothing**2))
    for axis in (0, 1):
        disk = correlate1d(disk, weights / weights.sum(), axis, mode="mirror")
    return filtered(values, disk)


@CORRUPTIONS.register(
    "glass_blur",
    summary="frosted glass",
    levels=((0.7, 1, 2), (0.9, 2, 1), (1.0, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
)
def glass_blur(values: Values, level: tuple[float, int, int], rng: np.random.Generator) -> Values:
    """Blur, give each pixel in turn the colour of one near to it, several times over, and blur again.

    The published code means to exchange the two pixels, but its arrays are views, so the near one keeps its colour; so
    it is here.
    """
    sigma, reach, rounds = level
    height, width = values.shape[:2]

    # From the bottom right to the top left; a pixel may take what came there in the same round.
    rows, columns = np.mgrid[height - reach : reach : -1, width - reach : reach : -1]
    targets = (rows * width + columns).ravel().tolist()
    taken = list(range(height * width))
    for _ in range(rounds):
        right, down = rng.integers(-reach, reach, (2, *rows.shape))
        near = ((rows + down) * width + columns + right).ravel().tolist()
        for target, other in zip(targets, near, strict=True):
            taken[target] = taken[other]

    soft = blurred(values, sigma).reshape(height * width, -1)
    return blurred(soft[taken].reshape(values.shape), sigma)


@CORRUPTIONS.register(
    "motion_blur",
    summary="a moving camera",
    levels=((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
)
def motion_blur(values: Values, level: tuple[int, float], rng: np.random.Generator) -> Values:
    """Blur along a line that is within 45 degrees of the width."""
    radius, sigma = level
    return streaked(values, radius, sigma, rng.uniform(-45, 45))


@CORRUPTIONS.register(
    "zoom_blur",
    summary="a camera that comes nearer",
    levels=((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
)
def zoom_blur(values: Values, level: tuple[float, float], rng: np.random.Generator) -> Values:
    """Average the image and enlargements of its middle, from 1 in steps up to a factor."""
    end, step = level
    factors = np.arange(1, end, step).tolist()
    total = sum((enlarged(values, factor) for factor in factors), start=values)
    return total / (len(factors) + 1)


@CORRUPTIONS.register("gaussian_blur", summary="a soft image", levels=(1, 2, 3, 4, 6))
def gaussian_blur(values: Values, sigma: float, rng: np.random.Generator) -> Values:
    """Blur by a Gaussian of so many pixels."""
    return blurred(values, sigma)
