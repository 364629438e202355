"""Common corruptions of images: 19 kinds at severities 1 to 5, one function each, discovered, never listed.

Sources: Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations",
    ICLR 2019, arXiv 1903.12261, section 4; the numbers are those of Michaelis et al., arXiv 1907.07484, whose package
    ``imagecorruptions`` others use too. All of them are meant for images of 224 x 224 pixels.

Where this differs from that package: draws depend on nothing but a seed, the image, the kind and the severity; motion
is blurred without a program of its own; the textures of ``frost`` are made of noise, for the photographs that the
package carries are not ours to ship. So no image is equal to one of ImageNet-C, and figures of the two differ a little.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from vlprompt.core.errors import DataError, UnknownNameError
from vlprompt.core.registry import Registry
from vlprompt.core.seeding import numpy_rng

__all__ = [
    "COMMON",
    "CORRUPTIONS",
    "EXTRA",
    "SEVERITIES",
    "SIZE",
    "CorruptionName",
    "Pixels",
    "Values",
    "corrupt",
    "expand_corruptions",
    "parse_corruption",
]

Pixels = np.ndarray[Any, np.dtype[np.uint8]]  # (H, W, 3), 0 to 255
Values = np.ndarray[Any, Any]  # (H, W, 3) or (H, W) floats, 0 to 1
Corruption = Callable[[Values, Any, np.random.Generator], Values]
"""Takes (H, W, 3) values in [0, 1], the numbers of a severity and a generator; returns the same with any values."""

CORRUPTIONS: Registry[Corruption] = Registry("corruption", "vlprompt.data.corruptions")
"""Every corruption by name; ``extra["levels"]`` has the numbers of the five severities."""

COMMON = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
"""The fifteen kinds that means are over, in the order in which streams of all of them go."""

EXTRA = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
"""Four more kinds, which the benchmark keeps for choosing hyper-parameters."""

SEVERITIES = (1, 2, 3, 4, 5)
SIZE = 224
"""Pixels a side of the images that the numbers are made for."""

_NAME = re.compile(r"(?P<base>.+)-c:(?P<kind>[^:]*):(?P<severity>[^:]*)", re.DOTALL)
_FAMILIES = {"common": COMMON, "extra": EXTRA}


class CorruptionName(NamedTuple):
    """A data set's name of the form ``BASE-c:KIND:SEVERITY``, for example ``digits-c:fog:3``.

    Attributes:
        base: Name of the data set that is corrupted.
        kind: See :data:`CORRUPTIONS`.
        severity: 0 (the images as they are) to 5.
    """

    base: str
    kind: str
    severity: int


def corrupt(pixels: Pixels, kind: str, severity: int, *, seed: int = 0, key: str = "") -> Pixels:
    """Return an image with a corruption.

    Args:
        pixels: (H, W, 3); the numbers are made for 224 x 224.
        kind: See :data:`CORRUPTIONS`.
        severity: 0 to 5; 0 changes nothing.
        seed: Of all draws.
        key: Stands for the image: equal keys have equal draws.

    Raises:
        UnknownNameError: For an unknown kind.
        DataError: For a severity outside 0 to 5, or pixels that are no RGB image of at least 32 x 32.
    """
    entry = CORRUPTIONS.get(kind)
    if severity not in (0, *SEVERITIES):
        raise DataError(f"the severity of a corruption is 0 (none) to {SEVERITIES[-1]}; got {severity!r}.")
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or min(pixels.shape[:2]) < 32:
        raise DataError(
            "a corruption takes (H, W, 3) bytes, at least 32 x 32 pixels; got "
            f"{pixels.dtype} {tuple(pixels.shape)}."
        )
    if severity == 0:
        return pixels

    rng = numpy_rng(seed, "corruption", kind, severity, key)
    values = pixels.astype(np.float32) / np.float32(255)
    changed = entry.target(values, entry.extra["levels"][severity - 1], rng)
    # Cut, not rounded, as in the published images.
    return (255 * np.clip(changed, 0, 1)).astype(np.uint8)


def parse_corruption(name: str) -> CorruptionName | None:
    """Return what a data set's name says of a corruption; None if it has not the form ``BASE-c:KIND:SEVERITY``.

    Raises:
        UnknownNameError: For an unknown kind.
        DataError: For another severity than 0 to 5.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        return None

    base, kind, severity = found.groups()
    if kind in _FAMILIES:
        raise DataError(
            f"{name}: {kind!r} stands for {len(_FAMILIES[kind])} data sets, which a configuration of adaptation takes "
            f"one after another; here name one kind, for example {base}-c:{_FAMILIES[kind][0]}:{severity}."
        )
    if kind not in CORRUPTIONS:
        raise UnknownNameError("corruption", kind, [*COMMON, *EXTRA])
    if severity not in map(str, (0, *SEVERITIES)):
        raise DataError(f"{name}: the severity is 0 (none) to {SEVERITIES[-1]}; got {severity!r}.")
    return CorruptionName(base, kind, int(severity))


def expand_corruptions(name: str) -> list[str]:
    """Return the names that ``BASE-c:common:SEVERITY`` and ``BASE-c:extra:SEVERITY`` stand for; of others the name."""
    found = _NAME.fullmatch(name)
    if found is None or found["kind"] not in _FAMILIES:
        return [name]
    return [f"{found['base']}-c:{kind}:{found['severity']}" for kind in _FAMILIES[found["kind"]]]
