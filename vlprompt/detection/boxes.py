"""Set losses of boxes: one prediction per object by optimal matching, focal loss for classes, L1 and GIoU for boxes.

Papers: Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020, arXiv 2005.12872 (matching); Zhu et
al., "Deformable DETR", ICLR 2021, arXiv 2010.04159 (focal costs and weights); the recipe of OWL-ViT (Minderer et al.,
arXiv 2205.06230) is of this kind. transformers ships no loss with its OWL models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou

__all__ = ["Target", "box_losses", "match"]

_ALPHA = 0.25
CLASS = 2.0
BOX = 5.0
GIOU = 2.0
"""Weights of the three terms, in the costs of the matching and in the loss."""


class Target(TypedDict):
    """The objects of an image: ``labels`` (T,) and ``boxes`` (T, 4) as centre and sides, in fractions."""

    labels: Tensor
    boxes: Tensor


def box_losses(logits: Tensor, boxes: Tensor, targets: Sequence[Target]) -> dict[str, Tensor]:
    """Return weighted losses, each divided by the number of objects.

    Args:
        logits: (B, N, C).
        boxes: (B, N, 4) centre and sides, in fractions.
        targets: B images' objects.
    """
    pairs = match(logits, boxes, targets)
    count = max(1, sum(len(target["labels"]) for target in targets))
    wanted = torch.zeros_like(logits)
    distance = logits.new_zeros(())
    overlap = logits.new_zeros(())

    for image, (target, (rows, columns)) in enumerate(zip(targets, pairs, strict=True)):
        if not len(rows):
            continue
        wanted[image, rows, target["labels"].to(logits.device)[columns]] = 1
        predicted = boxes[image, rows]
        true = target["boxes"].to(boxes)[columns]
        distance = distance + (predicted - true).abs().sum()
        overlap = overlap + (1 - generalized_box_iou(_corners(predicted), _corners(true)).diagonal()).sum()

    return {
        "class": CLASS * _focal(logits, wanted).sum() / count,
        "box": BOX * distance / count,
        "giou": GIOU * overlap / count,
    }


@torch.no_grad()
def match(logits: Tensor, boxes: Tensor, targets: Sequence[Target]) -> list[tuple[Tensor, Tensor]]:
    """Return, per image, which predictions stand for which objects: (rows of N, columns of T).

    The sum of the costs of the chosen pairs is the least there is (Carion et al., section 3.1).

    Args:
        logits: (B, N, C).
        boxes: (B, N, 4) centre and sides, in fractions.
        targets: Objects of the B images.
    """
    pairs = []
    for scores, predicted, target in zip(logits.float().sigmoid(), boxes.float(), targets, strict=True):
        labels = target["labels"].to(scores.device)
        true = target["boxes"].to(predicted)

        if not len(labels):
            nothing = torch.zeros(0, dtype=torch.long)
            pairs.append((nothing, nothing))
            continue

        p = scores[:, labels]  # (N, T)
        positive = _ALPHA * (1 - p) ** 2 * -(p + 1e-8).log()
        negative = (1 - _ALPHA) * p**2 * -(1 - p + 1e-8).log()
        cost = CLASS * (positive - negative) + BOX * torch.cdist(predicted, true, p=1)
        cost = cost - GIOU * generalized_box_iou(_corners(predicted), _corners(true))
        rows, columns = linear_sum_assignment(cost.nan_to_num(nan=1e9).cpu().numpy())
        pairs.append((torch.as_tensor(rows), torch.as_tensor(columns)))

    return pairs


def _focal(logits: Tensor, wanted: Tensor) -> Tensor:
    """Return the focal loss of every logit (Lin et al., ICCV 2017, with gamma = 2)."""
    p = logits.sigmoid()
    missed = torch.where(wanted > 0, 1 - p, p)
    weight = torch.where(wanted > 0, _ALPHA, 1 - _ALPHA)
    return weight * missed.square() * F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")


def _corners(boxes: Tensor) -> Tensor:
    return box_convert(boxes, "cxcywh", "xyxy")
