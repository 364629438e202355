"""What several corruptions are made of: blurs along a line or with a kernel, enlargements, and fractal noise."""

from __future__ import annotations

import math

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.signal import fftconvolve

from vlprompt.data.corruptions import Values

__all__ = ["blurred", "enlarged", "filtered", "fractal", "streaked"]


def blurred(values: Values, sigma: float) -> Values:
    """Return (H, W) or (H, W, 3) values blurred by a Gaussian of ``sigma`` pixels; the border goes on."""
    sigmas = (sigma, sigma, 0)[: values.ndim]
    return gaussian_filter(values, sigmas, mode="nearest")


def filtered(values: Values, kernel: Values) -> Values:
    """Return (H, W, 3) values correlated with a (k, k) kernel, k odd; the border is mirrored."""
    radius = len(kernel) // 2
    padded = np.pad(values, ((radius, radius), (radius, radius), (0, 0)), mode="reflect")
    turned = kernel[::-1, ::-1, None].astype(np.float32)
    return fftconvolve(padded, turned, mode="valid", axes=(0, 1))


def streaked(values: Values, radius: int, sigma: float, degrees: float) -> Values:
    """Return (H, W) or (H, W, 3) values blurred to one side along a line; the border goes on.

    Args:
        values: Any.
        radius: 2 ``radius`` + 1 places are averaged, a pixel apart.
        sigma: The weight falls like a Gaussian of so many pixels.
        degrees: Direction of the line; 0 is along the width.
    """
    places = np.arange(2 * radius + 1)
    weights = np.exp(-(places**2) / (2 * sigma**2))
    weights /= weights.sum()

    height, width = values.shape[:2]
    sine = math.sin(math.radians(degrees))
    cosine = math.cos(math.radians(degrees))
    total = np.zeros_like(values)
    for place, weight in zip(places.tolist(), weights.tolist(), strict=True):
        down = -math.ceil(place * sine - 0.5)
        right = -math.ceil(place * cosine - 0.5)
        rows = np.clip(np.arange(height) - down, 0, height - 1)
        columns = np.clip(np.arange(width) - right, 0, width - 1)
        total += np.float32(weight) * values[rows][:, columns]
    return total


def enlarged(values: Values, factor: float) -> Values:
    """Return the middle of (H, W) or (H, W, 3) values, ``factor`` >= 1 times as large, bilinear, in the same shape."""
    for axis in (0, 1):
        size = values.shape[axis]
        cut = math.ceil(size / factor)
        count = max(size, round(cut * factor))
        first = (size - cut) // 2

        # The outermost pixels stay the outermost ones; what is too many is left out on both sides.
        places = np.linspace(first, first + cut - 1, count)[(count - size) // 2 :][:size]
        below = np.floor(places).astype(int)
        above = np.minimum(below + 1, first + cut - 1)
        shape = [1] * values.ndim
        shape[axis] = size
        share = (places - below).astype(np.float32).reshape(shape)
        values = values.take(below, axis) * (1 - share) + values.take(above, axis) * share
    return values


def fractal(shape: tuple[int, int], decay: float, rng: np.random.Generator) -> Values:
    """Return (H, W) fractal noise in [0, 1], smooth where ``decay`` is large (diamond-square algorithm).

    Fournier, Fussell and Carpenter, "Computer Rendering of Stochastic Models", CACM 25, 1982.

    Args:
        shape: H and W.
        decay: Each halving of the distance divides displacements by ``decay`` squared.
        rng: Of all draws.
    """
    size = 2 ** math.ceil(math.log2(max(shape)))
    heights = np.zeros((size, size))
    step = size
    reach = 1.0

    while step >= 2:
        half = step // 2

        def placed(sums: Values, reach: float = reach) -> Values:
            return sums / 4 + rng.uniform(-reach, reach, sums.shape)

        # The field is a torus: what leaves at one side comes in at the other.
        corners = heights[::step, ::step]
        below = np.roll(corners, -1, 0)
        right = np.roll(corners, -1, 1)
        centres = placed(corners + below + right + np.roll(below, -1, 1))
        heights[half::step, half::step] = centres
        heights[::step, half::step] = placed(corners + right + centres + np.roll(centres, 1, 0))
        heights[half::step, ::step] = placed(corners + below + centres + np.roll(centres, 1, 1))

        step = half
        reach /= decay**2

    heights -= heights.min()
    return (heights / heights.max())[: shape[0], : shape[1]].astype(np.float32)
