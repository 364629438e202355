"""Average precision of a detector, by torchmetrics (whose backend is pycocotools)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_convert

from vlprompt.core.errors import BackboneError
from vlprompt.detection.base import Detections, Detector
from vlprompt.detection.data import DetectionData

__all__ = ["average_precision", "features", "kept_boxes"]

MOST = 100
"""Boxes per image that count, as in COCO's evaluation."""


@torch.no_grad()
def average_precision(
    detector: Detector, concepts: Tensor, data: DetectionData, rows: dict[str, Tensor] | None = None
) -> dict[str, float]:
    """Return COCO's AP (mean over IoU 0.5 to 0.95), AP50 and AP75, fractions, and ``AP/<class>`` of each class.

    Args:
        detector: The host.
        concepts: (C, L, d), one per class of the data.
        data: Images with boxes.
        rows: What :func:`features` returned for them, if they are kept.

    Raises:
        BackboneError: If torchmetrics or pycocotools is missing; says what to do.
    """
    metric = _metric()
    start = 0
    for part in batches(detector, data) if rows is None else _split(rows, 64):
        found = detector.detect(part, concepts)
        objects = data.objects[start : start + len(found.boxes)]
        start += len(objects)
        truth = [
            {
                "boxes": torch.from_numpy(o.boxes),
                "labels": torch.from_numpy(o.labels),
                "iscrowd": torch.from_numpy(o.crowd).long(),
            }
            for o in objects
        ]
        metric.update(kept_boxes(found, [o.size for o in objects]), truth)
    numbers = metric.compute()
    names = {
        int(c): float(v)
        for c, v in zip(numbers["classes"].view(-1), numbers["map_per_class"].view(-1), strict=True)
    }
    per_class = {f"AP/{name}": names[i] for i, name in enumerate(data.classnames) if names.get(i, -1.0) >= 0}
    found_keys = {"AP": "map", "AP50": "map_50", "AP75": "map_75"}
    return {key: max(0.0, float(numbers[theirs])) for key, theirs in found_keys.items()} | per_class


@torch.no_grad()
def features(detector: Detector, data: DetectionData) -> dict[str, Tensor]:
    """Return what of all images no concept changes, float16 on the CPU; the first axis is the image."""
    parts = list(batches(detector, data))
    return {key: torch.cat([part[key].half().cpu() for part in parts]) for key in parts[0]}


def batches(detector: Detector, data: DetectionData, size: int = 32) -> Iterator[dict[str, Tensor]]:
    """Yield what of the images no concept changes, in batches."""
    for start in range(0, len(data), size):
        images = [detector.preprocess(data.image(i)) for i in range(start, min(start + size, len(data)))]
        with torch.no_grad():
            yield detector.frozen(torch.stack(images))


def kept_boxes(found: Detections, sizes: list[tuple[int, int]]) -> list[dict[str, Tensor]]:
    """Return each image's best (box, class) pairs as torchmetrics takes them, boxes x0 y0 x1 y1 in pixels."""
    scores = found.logits.float().sigmoid().cpu()
    corners = box_convert(found.boxes.float().cpu(), "cxcywh", "xyxy")
    kept = []
    for score, boxes, (width, height) in zip(scores, corners, sizes, strict=True):
        values, order = score.flatten().topk(min(MOST, score.numel()))
        boxes = boxes[order // score.shape[1]] * torch.tensor([width, height, width, height])
        kept.append({"boxes": boxes, "scores": values, "labels": order % score.shape[1]})
    return kept


def _split(rows: dict[str, Tensor], size: int) -> Iterator[dict[str, Tensor]]:
    count = len(next(iter(rows.values())))
    for start in range(0, count, size):
        yield {key: tensor[start : start + size].float() for key, tensor in rows.items()}


def _metric() -> Any:
    try:
        from torchmetrics.detection import MeanAveragePrecision

        return MeanAveragePrecision(box_format="xyxy", class_metrics=True, backend="pycocotools")
    except (ImportError, ModuleNotFoundError) as error:
        raise BackboneError(
            f"average precision needs torchmetrics and pycocotools ({error}): pip install 'vlprompt[detection]'."
        ) from error
