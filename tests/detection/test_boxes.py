from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torchvision.ops import generalized_box_iou

from vlprompt.detection.boxes import box_losses, match
from vlprompt.detection.data import ImageObjects


def drawn(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, list[dict[str, torch.Tensor]]]:
    rng = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(3, 7, 4, generator=rng)
    boxes = torch.rand(3, 7, 4, generator=rng) * 0.5 + 0.2
    counts = (2, 0, 3)
    targets = [
        {
            "labels": torch.randint(4, (n,), generator=rng),
            "boxes": torch.rand(n, 4, generator=rng) * 0.4 + 0.2,
        }
        for n in counts
    ]
    return logits, boxes, targets


def test_losses_are_those_of_deformable_detr() -> None:
    """transformers' own implementation, which says what the paper's code says."""
    pytest.importorskip("transformers")
    from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher, DeformableDetrImageLoss

    logits, boxes, targets = drawn()
    theirs = DeformableDetrImageLoss(
        DeformableDetrHungarianMatcher(class_cost=2.0, bbox_cost=5.0, giou_cost=2.0),
        4,
        0.25,
        ["labels", "boxes"],
    )
    expected = theirs(
        {"logits": logits, "pred_boxes": boxes},
        [{"class_labels": t["labels"], "boxes": t["boxes"]} for t in targets],
    )
    ours = box_losses(logits, boxes, targets)  # type: ignore[arg-type]
    weights = {"class": ("loss_ce", 2.0), "box": ("loss_bbox", 5.0), "giou": ("loss_giou", 2.0)}
    for name, (key, weight) in weights.items():
        assert float(ours[name]) == pytest.approx(weight * float(expected[key]), rel=1e-4)


def test_the_matching_is_the_cheapest_of_all() -> None:
    logits, boxes, targets = drawn(1)

    def corners(b: torch.Tensor) -> torch.Tensor:
        return torch.cat([b[..., :2] - b[..., 2:] / 2, b[..., :2] + b[..., 2:] / 2], -1)

    def cost(row: int, column: int, image: int) -> float:
        p = torch.sigmoid(logits[image, row, targets[image]["labels"][column]])
        focal = 0.25 * (1 - p) ** 2 * -torch.log(p) - 0.75 * p**2 * -torch.log(1 - p)
        mine, true = boxes[image, row], targets[image]["boxes"][column]
        giou = generalized_box_iou(corners(mine[None]), corners(true[None]))[0, 0]
        return float(2 * focal + 5 * (mine - true).abs().sum() - 2 * giou)

    for image, (rows, columns) in enumerate(match(logits, boxes, targets)):  # type: ignore[arg-type]
        count = len(targets[image]["labels"])
        total = sum(cost(int(r), int(c), image) for r, c in zip(rows, columns, strict=True))
        best = min(
            sum(cost(r, c, image) for c, r in enumerate(chosen))
            for chosen in itertools.permutations(range(7), count)
        )
        assert total == pytest.approx(best, abs=1e-3)


def test_images_without_objects_only_teach_what_is_not_there() -> None:
    logits, boxes, _ = drawn()
    nothing = {"labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4)}
    losses = box_losses(logits, boxes, [nothing] * 3)  # type: ignore[list-item]
    p = logits.double().sigmoid()
    expected = 2 * (0.75 * p**2 * -torch.log(1 - p)).sum()
    assert float(losses["class"]) == pytest.approx(float(expected), rel=1e-4)
    assert float(losses["box"]) == float(losses["giou"]) == 0


def test_targets_are_fractions_and_leave_crowds_out() -> None:
    entry = ImageObjects(
        np.array([[10, 10, 30, 20], [0, 0, 40, 40]], np.float32),
        np.array([3, 1]),
        np.array([False, True]),
        (40, 80),
    )
    target = entry.target()
    assert target["labels"].tolist() == [3]
    assert target["boxes"].tolist() == [[0.5, 0.1875, 0.5, 0.125]]
