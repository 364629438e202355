"""Preprocessing for segmentation, which sees whole images; classification crops their middle."""

from __future__ import annotations

from collections.abc import Callable

from PIL import Image
from torch import Tensor

__all__ = ["Squash"]


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
        whole = image.convert("RGB")
        if whole.size != self.size[::-1]:
            whole = whole.resize(self.size[::-1], Image.Resampling.BICUBIC)
        # The size is right already, so this resizes and crops nothing.
        return self.inner(whole)
