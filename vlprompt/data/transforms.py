"""Augmentations whose every view is a function of (seed, image, view number) and of nothing else.

Because batching, order and workers can't change a view, its features can be cached and a killed run resumes
exactly.

Paper: CoOp, 2109.01134, section 4.1 (random resized crop and flip).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from vlprompt.core.errors import DataError, UnknownNameError
from vlprompt.core.seeding import numpy_rng

__all__ = [
    "AUGMENTATIONS",
    "Affine",
    "Augmentation",
    "Cut",
    "Preprocess",
    "affine_of",
    "crop_box",
    "cut_views",
    "output_size",
]

AUGMENTATIONS = ("none", "flip", "crop_flip", "crop_flip_pil")
Preprocess = Callable[[Image.Image], torch.Tensor]
_RATIO = (3 / 4, 4 / 3)  # width / height of a crop, as in the reference's RandomResizedCrop
_TRIES = 10


@dataclass(frozen=True)
class Augmentation:
    """A named augmentation.

    Attributes:
        name: ``"none"``, ``"flip"`` (left-right, half of the views) or ``"crop_flip"`` (a random crop resized
            to the backbone's input, bicubic, then the flip). ``"crop_flip_pil"`` cuts and resizes the same crops by
            Pillow, as the papers' code does: for comparing numbers, three to four times as slow.
        scale: Smallest and largest share of the image's area that ``crop_flip`` keeps, in (0, 1].

    Raises:
        UnknownNameError: For another name.
        DataError: For an impossible scale.
    """

    name: str = "none"
    scale: tuple[float, float] = (0.08, 1.0)

    def __post_init__(self) -> None:
        if self.name not in AUGMENTATIONS:
            raise UnknownNameError("augmentation", self.name, AUGMENTATIONS)
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise DataError(
                f"augmentation scale must be (low, high) with 0 < low <= high <= 1; got {self.scale}."
            )

    @classmethod
    def parse(cls, text: str) -> Augmentation:
        """Return what a name means; ``"crop_flip:0.5"`` keeps at least half of the image's area.

        Raises:
            UnknownNameError: For another name.
            DataError: If the share is not in (0, 1], or follows another name.
        """
        name, colon, share = text.partition(":")
        if not colon or name not in AUGMENTATIONS:
            return cls(name)

        try:
            least = float(share if name.startswith("crop_flip") else "none")
        except ValueError as error:
            raise DataError(
                f"augmentation {text!r}: only crop_flip takes a number, the smallest share of the image it keeps, "
                "for example crop_flip:0.5."
            ) from error

        return cls(name, (least, 1.0))

    @property
    def crops(self) -> bool:
        """Whether views are crops."""
        return self.name.startswith("crop_flip")

    @property
    def is_random(self) -> bool:
        """Whether views of one image differ."""
        return self.name != "none"

    def describe(self, seed: int, view: int) -> str:
        """Return a string that is equal exactly for equal views (feature caches are keyed by it)."""
        if not self.is_random:
            return "none"
        scale = f"[{self.scale[0]:g},{self.scale[1]:g}]" if self.crops else ""
        by = ";tensor" if self.name == "crop_flip" else ""
        return f"{self.name.removesuffix('_pil')}{scale}{by};seed={seed};view={view}"

    def augment(
        self, image: Image.Image, preprocess: Preprocess, seed: int, key: str, view: int = 0
    ) -> torch.Tensor:
        """Return one view of an image, preprocessed.

        Args:
            image: RGB.
            preprocess: The backbone's: PIL image to (3, H, W).
            seed: The run's seed.
            key: The image's content key (:meth:`vlprompt.data.base.ImageDataset.key`).
            view: Number of the view, from 0.

        Returns:
            (3, H, W), what ``preprocess`` returns.
        """
        return self.augment_all(image, preprocess, seed, key, [view])[0]

    def augment_all(
        self, image: Image.Image, preprocess: Preprocess, seed: int, key: str, views: Sequence[int]
    ) -> torch.Tensor:
        """Return several views of an image that is decoded once, (V, 3, H, W); arguments as :meth:`augment`."""
        if self.name == "crop_flip":
            size = output_size(preprocess)
            affine = affine_of(preprocess, size)
            if affine is not None:
                cuts = [self._cut(image, self._draws(seed, key, view)) for view in views]
                return affine(cut_views(image, cuts, size, "bicubic"))

        return torch.stack([self._by_pillow(image, preprocess, seed, key, view) for view in views])

    def _draws(self, seed: int, key: str, view: int) -> np.random.Generator:
        # Named by the image's content, not by its position: order and batches don't matter.
        return numpy_rng(seed, "augment", self.name.removesuffix("_pil"), key, view)

    def _cut(self, image: Image.Image, rng: np.random.Generator) -> Cut:
        box = crop_box(image.height, image.width, self.scale, rng.random)
        return Cut(*box, flipped=rng.random() < 0.5)

    def _by_pillow(
        self, image: Image.Image, preprocess: Preprocess, seed: int, key: str, view: int
    ) -> torch.Tensor:
        """Return one view, cut by Pillow."""
        if not self.is_random:
            return preprocess(image)

        rng = self._draws(seed, key, view)
        if self.crops:
            cut = self._cut(image, rng)
            image = tvf.resized_crop(
                image,
                *(cut.top, cut.left, cut.height, cut.width),
                list(output_size(preprocess)),
                interpolation=InterpolationMode.BICUBIC,
            )
            flipped = cut.flipped
        else:
            flipped = rng.random() < 0.5

        return preprocess(tvf.horizontal_flip(image) if flipped else image)


@dataclass(frozen=True)
class Cut:
    """A crop of an image, in pixels, and whether it is flipped left-right once it is resized."""

    top: int
    left: int
    height: int
    width: int
    flipped: bool


def cut_views(
    image: Image.Image,
    cuts: Sequence[Cut],
    size: tuple[int, int],
    interpolation: Literal["bilinear", "bicubic"],
) -> torch.Tensor:
    """Return crops of an RGB image, resized with antialiasing and flipped, (V, 3, H, W) uint8.

    Torch's resizing of bytes differs from Pillow's by rounding alone: by one of 255 in few pixels.

    Args:
        image: RGB.
        cuts: V crops.
        size: H and W.
        interpolation: Of the resizing.
    """
    pixels = tvf.pil_to_tensor(image)
    mode = InterpolationMode(interpolation)
    views = torch.empty(len(cuts), 3, *size, dtype=torch.uint8)

    for row, cut in zip(views, cuts, strict=True):
        box = (cut.top, cut.left, cut.height, cut.width)
        view = tvf.resized_crop(pixels, *box, list(size), mode, antialias=True)
        row.copy_(view.flip(-1) if cut.flipped else view)
    return views


@dataclass(frozen=True)
class Affine:
    """What a backbone's preprocessing does to bytes that have its input's size already: scale x + shift.

    Attributes:
        scale: (3, 1, 1).
        shift: (3, 1, 1).
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __call__(self, views: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return float32 of (V, 3, H, W) uint8, in ``out`` if there is one."""
        result = torch.empty(views.shape) if out is None else out
        for row, view in zip(
            result, views, strict=True
        ):  # one view fits into a core's cache, all of them do not
            row.copy_(view).mul_(self.scale).add_(self.shift)
        return result

    def undo(self, images: torch.Tensor) -> torch.Tensor:
        """Return the uint8 that (..., 3, H, W) float32 images were made of."""
        # Rounded: a cast would cut off what float32 lost of a whole number.
        return ((images - self.shift) / self.scale).round().clamp(0, 255).to(torch.uint8)


@lru_cache(maxsize=8)
def affine_of(preprocess: Preprocess, size: tuple[int, int]) -> Affine | None:
    """Return what a preprocessing does to images of the size that it makes, None if it is not the same at each pixel.

    It is found by trying: black and white tell scale and shift, and noise tells whether they are all.

    Args:
        preprocess: The backbone's.
        size: H and W of what it makes.
    """
    height, width = size
    noise = numpy_rng(0, "preprocessing").integers(0, 256, (height, width, 3)).astype(np.uint8)

    black, white = (preprocess(Image.new("RGB", (width, height), (grey, grey, grey))) for grey in (0, 255))
    if black.shape != (3, height, width) or not black.is_floating_point():
        return None
    scale = (white - black)[:, :1, :1] / 255
    affine = Affine(scale.float(), black[:, :1, :1].float())

    image = Image.fromarray(noise)
    expected = preprocess(image).float()
    found = affine(tvf.pil_to_tensor(image)[None])[0]
    return affine if torch.allclose(found, expected, rtol=0, atol=1e-4) else None


def crop_box(
    height: int, width: int, scale: tuple[float, float], draw: Callable[[], float]
) -> tuple[int, int, int, int]:
    """Return (top, left, height, width) of a random crop: torchvision's rule with our draws in [0, 1)."""
    for _ in range(_TRIES):
        area = height * width * (scale[0] + draw() * (scale[1] - scale[0]))
        low, high = map(math.log, _RATIO)
        ratio = math.exp(low + draw() * (high - low))
        w = round(math.sqrt(area * ratio))
        h = round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(draw() * (height - h + 1)), int(draw() * (width - w + 1)), h, w

    w = min(width, round(height * _RATIO[1]))
    h = min(height, round(width / _RATIO[0]))
    return (height - h) // 2, (width - w) // 2, h, w


def output_size(preprocess: Preprocess) -> tuple[int, int]:
    """Return (H, W) of what ``preprocess`` makes: its attribute ``size``, or else the shape of a trial."""
    size = getattr(preprocess, "size", None)
    if isinstance(size, int):
        return size, size
    if isinstance(size, tuple) and len(size) == 2:
        return size
    return _tried_size(preprocess)


@lru_cache(maxsize=8)
def _tried_size(preprocess: Preprocess) -> tuple[int, int]:
    probe = preprocess(Image.new("RGB", (8, 8)))
    return int(probe.shape[-2]), int(probe.shape[-1])
