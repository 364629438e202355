"""Losses of text-prompted segmentation: Dice and cross-entropy of single images, also for empty masks.

Paper: TuneVLSeg, ACCV 2024, 2410.05239, section 4 (1.0 Dice + 0.2 cross-entropy).
segmentation_models_pytorch's DiceLoss pools the pixels of a batch and multiplies by 0 where a mask is empty, so that
it can't learn that a phrase fits nothing. This one does neither. Names that begin with ``smp_`` take that library's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from vlprompt.core.errors import UnknownNameError, VLPromptError
from vlprompt.data.segmentation.base import IGNORE

__all__ = ["LOSSES", "LossName", "bce", "dice", "segmentation_loss"]

LossName = Literal["dice_bce", "smp_dice_bce", "smp_focal", "smp_tversky", "smp_jaccard", "smp_lovasz"]
LOSSES: tuple[str, ...] = get_args(LossName)
_SMOOTH = 1e-5


def segmentation_loss(
    name: LossName = "dice_bce", dice_weight: float = 1.0, bce_weight: float = 0.2
) -> Callable[[Tensor, Tensor], dict[str, Tensor]]:
    """Return a function of (B, 1, H, W) logits and (B, H, W) masks to named losses, each a mean over images.

    Args:
        name: One of :data:`LOSSES`.
        dice_weight: Of Dice in ``dice_bce`` and ``smp_dice_bce``.
        bce_weight: Of cross-entropy in them.

    Raises:
        UnknownNameError: For another name.
        VLPromptError: If segmentation_models_pytorch is needed and not installed.
    """
    if name not in LOSSES:
        raise UnknownNameError("segmentation loss", name, LOSSES)

    if name == "dice_bce":
        return lambda logits, masks: {
            "dice": dice_weight * dice(logits, masks),
            "bce": bce_weight * bce(logits, masks),
        }

    smp_loss = _smp_loss(name)
    if name == "smp_dice_bce":
        return lambda logits, masks: {
            "dice": dice_weight * smp_loss(logits, _floats(masks)[:, None]),
            "bce": bce_weight * bce(logits, masks),
        }
    return lambda logits, masks: {name.removeprefix("smp_"): smp_loss(logits, _floats(masks)[:, None])}


def dice(logits: Tensor, masks: Tensor) -> Tensor:
    """Return the mean over images of 1 - (2 sum p t + s) / (sum p + sum t + s), s = 1e-5.

    An empty mask gives 1 - s / (sum p + s): near 1 as long as anything is predicted, with a gradient.

    Args:
        logits: (B, 1, H, W).
        masks: (B, H, W) of 0, 1, and 255 where a pixel doesn't count.
    """
    counts = (masks != IGNORE).flatten(1)
    p = logits.float().flatten(1).sigmoid() * counts
    t = (masks == 1).flatten(1).float()
    overlap = (p * t).sum(1)
    total = p.sum(1) + t.sum(1)
    return (1 - (2 * overlap + _SMOOTH) / (total + _SMOOTH)).mean()


def bce(logits: Tensor, masks: Tensor) -> Tensor:
    """Return the mean over images of the mean cross-entropy of the pixels that count; arguments as :func:`dice`."""
    counts = (masks != IGNORE).flatten(1).float()
    targets = (masks == 1).flatten(1).float()
    per_pixel = F.binary_cross_entropy_with_logits(logits.float().flatten(1), targets, reduction="none")
    per_image = (per_pixel * counts).sum(1) / counts.sum(1).clamp(min=1)
    return per_image.mean()


def _floats(masks: Tensor) -> Tensor:
    """Return masks as floats.

    Raises:
        VLPromptError: If there are pixels that don't count.
    """
    if bool((masks == IGNORE).any()):
        raise VLPromptError("losses of segmentation_models_pytorch know no ignored pixels; use dice_bce.")
    return masks.float()


def _smp_loss(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a loss of segmentation_models_pytorch."""
    try:
        from segmentation_models_pytorch import losses  # an extra of the package
    except ImportError:
        raise VLPromptError(
            f"loss {name!r} needs segmentation_models_pytorch: pip install 'vlprompt[segmentation]'. dice_bce doesn't."
        ) from None

    kinds: dict[str, Callable[[], torch.nn.Module]] = {
        "smp_dice_bce": lambda: losses.DiceLoss("binary"),
        "smp_focal": lambda: losses.FocalLoss("binary"),
        "smp_tversky": lambda: losses.TverskyLoss("binary"),
        "smp_jaccard": lambda: losses.JaccardLoss("binary"),
        "smp_lovasz": lambda: losses.LovaszLoss("binary"),
    }
    return kinds[name]()
