"""Visual prompts of pixels: a learned frame around the image, and a learned patch in its corner.

Paper: Bahng et al., "Exploring Visual Prompts for Adapting Large-Scale Models", arXiv 2203.17274, section 3. Only
pixels that are learned are parameters: for a frame of 30 pixels around 224 x 224 these are the paper's 69,840.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["default_frame", "frame_size", "place_pixels"]


def default_frame(size: tuple[int, int]) -> int:
    """Return the frame's width in pixels for images of (H, W): the paper's 30 of 224, at least 1."""
    return max(1, round(30 / 224 * min(size)))


def frame_size(size: tuple[int, int], width: int) -> int:
    """Return how many pixels a frame has.

    Args:
        size: (H, W) of the image.
        width: P, of the frame.
    """
    return size[0] * size[1] - (size[0] - 2 * width) * (size[1] - 2 * width)


def place_pixels(size: tuple[int, int], width: int, frame: Tensor | None, patch: Tensor | None) -> Tensor:
    """Return (3, H, W): learned pixels in their places, 0 elsewhere. Where frame and patch overlap they add up.

    Args:
        size: (H, W) of the image.
        width: P, of the frame.
        frame: (3, K) values of the frame's K pixels, row by row; None without a frame.
        patch: (3, S, S) values of the patch in the upper left corner; None without a patch.
    """
    height, length = size
    reference = patch if frame is None else frame
    assert reference is not None  # a prompt has at least one of them

    canvas = reference.new_zeros(3, height, length)
    if frame is not None:
        inner = height - 2 * width
        top, sides, bottom = frame.split([width * length, 2 * width * inner, width * length], dim=1)
        left, right = sides.view(3, inner, 2 * width).split(width, dim=2)
        middle = torch.cat([left, frame.new_zeros(3, inner, length - 2 * width), right], dim=2)
        canvas = torch.cat([top.view(3, width, length), middle, bottom.view(3, width, length)], dim=1)

    if patch is not None:
        side = patch.shape[-1]
        canvas = canvas + F.pad(patch, (0, length - side, 0, height - side))
    return canvas
