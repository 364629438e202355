"""Average precision of a detector, by torchmetrics (whose backend is pycocotools)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_convert

from vlprompt.core.errors import BackboneError, DataError
from vlprompt.data.loading import Loader
from vlprompt.detection.base import Detections, Detector
from vlprompt.detection.data import DetectionData, ImageObjects

__all__ = ["average_precision", "best_boxes", "features"]

MOST = 100
"""Boxes per image that count, as in COCO's evaluation."""

_METRICS = {"AP": "map", "AP50": "map_50", "AP75": "map_75"}  # our names to torchmetrics'


@torch.no_grad()
def average_precision(
    detector: Detector, concepts: Tensor, data: DetectionData, rows: dict[str, Tensor] | None = None
) -> dict[str, float]:
    """Return COCO's AP (mean over IoU 0.5 to 0.95), AP50 and AP75, fractions, and ``AP/<class>`` of each class.

    Args:
        detector: The host.
        concepts: (C, L, d), one per class of the data.
        data: Images with boxes.
        rows: What :func:`features` returned for them; None: images are encoded here.

    Raises:
        BackboneError: If torchmetrics or pycocotools is missing; says what to do.
        DataError: If no image has an object: average precision is undefined then.
    """
    if all(entry.crowd.all() for entry in data.objects):
        raise DataError(
            f"{data.name}: none of its {len(data)} images has an object, so average precision is undefined. Take more "
            "images, or others."
        )
    metric = _metric()
    start = 0

    for part in batches(detector, data) if rows is None else _split(rows, 64):
        detections = detector.detect(part, concepts)
        objects = data.objects[start : start + len(detections.boxes)]
        start += len(objects)
        predictions = best_boxes(detections, [entry.size for entry in objects])
        metric.update(predictions, [_truth(entry) for entry in objects])

    numbers = metric.compute()
    scores = {name: max(0.0, float(numbers[key])) for name, key in _METRICS.items()}
    by_class = zip(numbers["classes"].view(-1), numbers["map_per_class"].view(-1), strict=True)
    per_class = {int(label): float(value) for label, value in by_class}

    for label, name in enumerate(data.classnames):
        if per_class.get(label, -1.0) >= 0:  # -1: the class has no object
            scores[f"AP/{name}"] = per_class[label]

    return scores


@torch.no_grad()
def features(detector: Detector, data: DetectionData) -> dict[str, Tensor]:
    """Return what no concept changes of all images, float16 on the CPU; the first axis is the image."""
    parts = list(batches(detector, data))
    return {key: torch.cat([part[key].half().cpu() for part in parts]) for key in parts[0]}


def batches(detector: Detector, data: DetectionData, size: int = 32) -> Iterator[dict[str, Tensor]]:
    """Yield what no concept changes of the images, in batches."""
    rows = range(len(data))
    with Loader(_ImageReader(data, detector)) as loader:
        for images in loader.stream([rows[start : start + size] for start in rows[::size]]):
            with torch.no_grad():
                yield detector.frozen(images)


@dataclass(frozen=True)
class _ImageReader:
    """Reads images of a data set for a detector."""

    data: DetectionData
    detector: Detector

    def __call__(self, rows: range) -> Tensor:
        """Return (B, 3, h, w)."""
        return torch.stack([self.detector.preprocess(self.data.image(i)) for i in rows])


def best_boxes(detections: Detections, sizes: list[tuple[int, int]]) -> list[dict[str, Tensor]]:
    """Return the best (box, class) pairs of each image as torchmetrics takes them.

    Args:
        detections: Of B images.
        sizes: Width and height of each in pixels.

    Returns:
        For each image ``boxes`` (n, 4) x0, y0, x1, y1 in pixels, ``scores`` (n,) and ``labels`` (n,).
    """
    scores = detections.logits.float().sigmoid().cpu()
    corners = box_convert(detections.boxes.float().cpu(), "cxcywh", "xyxy")
    best = []

    for score, boxes, (width, height) in zip(scores, corners, sizes, strict=True):
        classes = score.shape[1]
        values, order = score.flatten().topk(min(MOST, score.numel()))
        pixels = boxes[order // classes] * torch.tensor([width, height, width, height])
        best.append({"boxes": pixels, "scores": values, "labels": order % classes})

    return best


def _truth(objects: ImageObjects) -> dict[str, Tensor]:
    """Return an image's objects as torchmetrics takes them."""
    return {
        "boxes": torch.from_numpy(objects.boxes),
        "labels": torch.from_numpy(objects.labels),
        "iscrowd": torch.from_numpy(objects.crowd).long(),
    }


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
