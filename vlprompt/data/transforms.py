"""Augmentations whose every view is a function of (seed, image, view number) and of nothing else.

Because batching, order and workers can't change a view, its features can be cached and a killed run resumes
exactly.

Paper: CoOp, 2109.01134, section 4.1 (random resized crop and flip).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tvf

from vlprompt.core.errors import DataError, UnknownNameError
from vlprompt.core.seeding import numpy_rng

__all__ = ["AUGMENTATIONS", "Augmentation", "Preprocess", "crop_box"]

AUGMENTATIONS = ("none", "flip", "crop_flip")
Preprocess = Callable[[Image.Image], torch.Tensor]
_RATIO = (3 / 4, 4 / 3)  # width / height of a crop, as in the reference's RandomResizedCrop
_TRIES = 10


@dataclass(frozen=True)
class Augmentation:
    """A named augmentation.

    Attributes:
        name: ``"none"``, ``"flip"`` (left-right, half of the views) or ``"crop_flip"`` (a random crop resized
            to the backbone's input, bicubic, then the flip).
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
            least = float(share if name == "crop_flip" else "none")
        except ValueError as error:
            raise DataError(
                f"augmentation {text!r}: only crop_flip takes a number, the smallest share of the image it keeps, "
                "for example crop_flip:0.5."
            ) from error

        return cls(name, (least, 1.0))

    @property
    def is_random(self) -> bool:
        """Whether views of one image differ."""
        return self.name != "none"

    def describe(self, seed: int, view: int) -> str:
        """Return a string that is equal exactly for equal views (feature caches are keyed by it)."""
        if not self.is_random:
            return "none"
        scale = f"[{self.scale[0]:g},{self.scale[1]:g}]" if self.name == "crop_flip" else ""
        return f"{self.name}{scale};seed={seed};view={view}"

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
        if not self.is_random:
            return preprocess(image)

        # Named by the image's content, not by its position: order and batches don't matter.
        rng = numpy_rng(seed, "augment", self.name, key, view)
        if self.name == "crop_flip":
            height, width = _output_size(preprocess, image)
            top, left, crop_h, crop_w = crop_box(image.height, image.width, self.scale, rng.random)
            image = tvf.resized_crop(
                image, top, left, crop_h, crop_w, [height, width], interpolation=InterpolationMode.BICUBIC
            )

        if rng.random() < 0.5:
            image = tvf.horizontal_flip(image)

        return preprocess(image)


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


def _output_size(preprocess: Preprocess, image: Image.Image) -> tuple[int, int]:
    """Return (H, W) of what ``preprocess`` makes: its attribute ``size``, or else the shape of a trial."""
    size = getattr(preprocess, "size", None)
    if isinstance(size, int):
        return size, size
    if isinstance(size, tuple) and len(size) == 2:
        return size
    probe = preprocess(image.crop((0, 0, min(image.width, 8), min(image.height, 8))))
    return int(probe.shape[-2]), int(probe.shape[-1])
