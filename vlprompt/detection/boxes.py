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
CLASS, BOX, GIOU = 2.0, 5.0, 2.0
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
    count = max(1, sum(len(t["labels"]) for t in targets))
    wanted = torch.zeros_like(logits)
    distance, overlap = logits.new_zeros(()), logits.new_zeros(())
    for b, (target, (rows, columns)) in enumerate(zip(targets, pairs, strict=True)):
        if not len(rows):
            continue
        wanted[b, rows, target["labels"].to(logits.device)[columns]] = 1
        true, found = target["boxes"].to(boxes)[columns], boxes[b, rows]
        distance = distance + (found - true).abs().sum()
        overlap = overlap + (1 - generalized_box_iou(_corners(found), _corners(true)).diagonal()).sum()
    return {
        "class": CLASS * _focal(logits, wanted).sum() / count,
        "box": BOX * distance / count,
        "giou": GIOU * overlap / count,
    }


@torch.no_grad()
def match(logits: Tensor, boxes: Tensor, targets: Sequence[Target]) -> list[tuple[Tensor, Tensor]]:
    """Return, per image, which predictions stand for which objects: (rows of N, columns of T)."""
    found = []
    for scores, mine, target in zip(logits.float().sigmoid(), boxes.float(), targets, strict=True):
        labels, true = target["labels"].to(scores.device), target["boxes"].to(mine)
        if not len(labels):
            found.append((torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long)))
            continue
        p = scores[:, labels]
        positive = _ALPHA * (1 - p) ** 2 * -(p + 1e-8).log()
        negative = (1 - _ALPHA) * p**2 * -(1 - p + 1e-8).log()
        cost = CLASS * (positive - negative) + BOX * torch.cdist(mine, true, p=1)
        cost = cost - GIOU * generalized_box_iou(_corners(mine), _corners(true))
        rows, columns = linear_sum_assignment(cost.nan_to_num(nan=1e9).cpu().numpy())
        found.append((torch.as_tensor(rows), torch.as_tensor(columns)))
    return found


def _focal(logits: Tensor, wanted: Tensor) -> Tensor:
    """Return the focal loss of every logit (Lin et al., ICCV 2017, with gamma = 2)."""
    p = logits.sigmoid()
    missed = torch.where(wanted > 0, 1 - p, p)
    weight = torch.where(wanted > 0, _ALPHA, 1 - _ALPHA)
    return weight * missed.square() * F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")


def _corners(boxes: Tensor) -> Tensor:
    return box_convert(boxes, "cxcywh", "xyxy")
