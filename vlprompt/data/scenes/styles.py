"""Render styles: the same scene as another domain would show it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["apply_style"]

Array = NDArray[Any]


def apply_style(canvas: Array, style: str, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Turn a painted canvas into a finished image.

    Args:
        canvas: (H, W, 3) float32, nominally in [0, 1].
        style: One of the styles; ``"plain"`` only rounds.
        rng: Source of grain and noise.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    image = _STYLES[style](np.clip(canvas, 0, 1), rng)
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)


def _plain(image: Array, rng: np.random.Generator) -> Array:
    return image


def _sketch(image: Array, rng: np.random.Generator) -> Array:
    """Dark pencil lines where brightness or colour changes, on rough paper."""
    soft = _smooth(image, 0.6 * image.shape[0] / 64)
    dx = np.abs(np.diff(soft, axis=1, prepend=soft[:, :1])).sum(2)
    dy = np.abs(np.diff(soft, axis=0, prepend=soft[:1])).sum(2)
    line = np.clip((dx + dy) * 1.6 - 0.2, 0, 1)
    paper = 0.93 + rng.normal(0, 0.03, line.shape).astype(np.float32)
    return np.repeat((paper * (1 - 0.9 * line))[..., None], 3, 2)


def _inverted(image: Array, rng: np.random.Generator) -> Array:
    return 1 - image


def _noisy(image: Array, rng: np.random.Generator) -> Array:
    return image + np.float32(0.16) * rng.standard_normal(image.shape, np.float32)


def _blurred(image: Array, rng: np.random.Generator) -> Array:
    return _smooth(image, 1.7 * image.shape[0] / 64)


def _night(image: Array, rng: np.random.Generator) -> Array:
    """Little bluish light from one side, and a sensor's noise."""
    side = image.shape[0]
    ramp = np.linspace(0.75, 1.25, side, dtype=np.float32)
    ramp = ramp if rng.random() < 0.5 else ramp[::-1]
    lit = image * np.asarray([0.30, 0.33, 0.46], np.float32) * ramp[None, :, None] + np.asarray(
        [0.0, 0.01, 0.05], np.float32
    )
    return lit + np.float32(0.03) * rng.standard_normal(image.shape, np.float32)


def _pixelated(image: Array, rng: np.random.Generator) -> Array:
    side = image.shape[0]
    block = max(1, side // 16)
    edges = np.arange(0, side, block)
    mean = np.add.reduceat(np.add.reduceat(image, edges, 0), edges, 1)
    length = np.diff(np.append(edges, side))
    mean /= (length[:, None] * length[None, :])[..., None]
    return np.repeat(np.repeat(mean, length, 0), length, 1)


def _smooth(image: Array, sigma: float) -> Array:
    """Separable Gaussian blur with clamped borders."""
    reach = max(1, int(np.ceil(2.5 * sigma)))
    offsets = np.arange(-reach, reach + 1)
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2).astype(np.float32)
    kernel /= kernel.sum()

    for axis in (0, 1):
        pad = [(reach, reach) if a == axis else (0, 0) for a in range(3)]
        wide = np.pad(image, pad, mode="edge")
        length = image.shape[axis]
        image = sum(weight * wide.take(range(i, i + length), axis) for i, weight in enumerate(kernel))

    return np.asarray(image, np.float32)


_STYLES: dict[str, Callable[[Array, np.random.Generator], Array]] = {
    "plain": _plain,
    "sketch": _sketch,
    "inverted": _inverted,
    "noisy": _noisy,
    "blurred": _blurred,
    "night": _night,
    "pixelated": _pixelated,
}
