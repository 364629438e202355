"""Preprocessing for segmentation, which sees whole images; classification crops their middle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlprompt.core.pixels import to_rgb

__all__ = ["Sized", "Squash"]


class Squash:
    """Preprocessing that resizes an image to the backbone's input size, proportions or not, and crops nothing.

    Args:
        preprocess: The backbone's: PIL image to (3, h, w).

    Attributes:
        size: (h, w) of what comes out.
    """

    def __init__(self, preprocess: Callable[[Image.Image], Tensor]) -> None:
        self.inner = preprocess
        height, width = preprocess(Image.new("RGB", (8, 8))).shape[-2:]
        self.size = (int(height), int(width))

    def __call__(self, image: Image.Image) -> Tensor:
        """Return (3, h, w) normalised pixels."""
        whole = to_rgb(image)
        if whole.size != self.size[::-1]:
            whole = whole.resize(self.size[::-1], Image.Resampling.BICUBIC)
        # The size is right already, so this resizes and crops nothing.
        return self.inner(whole)


class Sized:
    """The same at another size than the backbone's own: resize and normalise.

    Args:
        size: (h, w) of what comes out.
        facts: The backbone's, with ``mean`` and ``std`` of each channel.
    """

    def __init__(self, size: tuple[int, int], facts: Mapping[str, Any]) -> None:
        self.size = size
        self.mean, self.std = (torch.tensor(facts[key]).view(3, 1, 1) for key in ("mean", "std"))

    def __call__(self, image: Image.Image) -> Tensor:
        """Return (3, h, w) normalised pixels."""
        whole = to_rgb(image)
        if whole.size != self.size[::-1]:
            whole = whole.resize(self.size[::-1], Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(whole)).permute(2, 0, 1).float() / 255
        return (pixels - self.mean) / self.std
