"""Augmentation of an image and its mask together, the paper's: hardly any, since phrases may name places and colours.

Paper: TuneVLSeg, ACCV 2024, 2410.05239; its public configuration (affine with probability 0.2, then brightness and
contrast with probability 0.2, no flips). Drawn as all views here: a function of (seed, image, view) alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vlprompt.core.errors import UnknownNameError
from vlprompt.core.seeding import numpy_rng
from vlprompt.data.segmentation.base import MaskedImage

__all__ = ["JointAugmentation"]

_KINDS = ("none", "slight")


@dataclass(frozen=True)
class JointAugmentation:
    """A named augmentation of pairs.

    Attributes:
        name: ``"none"``, or ``"slight"``: in a fifth of the views turned by up to 5 degrees, scaled by up to 2 % and
            moved by up to 2 % (the border repeated), in a fifth brightness and contrast changed by up to 10 %.

    Raises:
        UnknownNameError: For another name.
    """

    name: str = "none"

    def __post_init__(self) -> None:
        if self.name not in _KINDS:
            raise UnknownNameError("augmentation of pairs", self.name, _KINDS)

    @property
    def is_random(self) -> bool:
        """Whether views of one pair differ."""
        return self.name != "none"

    def augment(self, pair: MaskedImage, seed: int, view: int) -> tuple[Image.Image, NDArray[np.uint8]]:
        """Return one view of an image and its mask, at their size."""
        if not self.is_random:
            return pair.image, pair.mask

        rng = numpy_rng(seed, "augment pair", self.name, pair.record, view)
        turn, tone = rng.random(2) < 0.2
        image = torch.from_numpy(np.array(pair.image)).float().permute(2, 0, 1)
        mask = torch.from_numpy(pair.mask.copy())

        if turn:
            scale = rng.uniform(0.98, 1.02)
            angle = math.radians(rng.uniform(-5, 5))
            shift = rng.uniform(-0.02, 0.02, 2)
            image, mask = _affine(image, mask, scale, angle, float(shift[0]), float(shift[1]))

        if tone:
            contrast = 1 + rng.uniform(-0.1, 0.1)
            brightness = 255 * rng.uniform(-0.1, 0.1)
            image = image * contrast + brightness

        pixels = image.round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
        return Image.fromarray(pixels), mask.numpy()


def _affine(
    image: Tensor, mask: Tensor, scale: float, angle: float, right: float, down: float
) -> tuple[Tensor, Tensor]:
    """Turn, scale and move (3, H, W) and (H, W); shifts are fractions of the sides."""
    height, width = mask.shape
    cos = math.cos(angle) / scale
    sin = math.sin(angle) / scale
    # grid_sample's coordinates run from -1 to 1 along both sides, so that a turn must know the sides' ratio.
    matrix = torch.tensor([
        [cos, sin * height / width, -2 * right],
        [-sin * width / height, cos, -2 * down],
    ])[None]  # fmt: skip
    grid = F.affine_grid(matrix, [1, 1, height, width], align_corners=False)
    turned = F.grid_sample(image[None], grid, mode="bicubic", padding_mode="border", align_corners=False)[0]
    turned_mask = F.grid_sample(
        mask[None, None].float(), grid, mode="nearest", padding_mode="border", align_corners=False
    )[0, 0]

    return turned, turned_mask.to(mask.dtype)
