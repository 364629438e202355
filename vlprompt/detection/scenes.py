"""Detection on drawn scenes: ``scenes/shape``, ``scenes/shape_colour``, each in every style (``...@sketch``)."""

from __future__ import annotations

import numpy as np
from PIL import Image

from vlprompt.core.errors import DataError
from vlprompt.data.scenes.attributes import check
from vlprompt.data.scenes.boxes import BOX_TASKS, BoxScenes, box_classes
from vlprompt.detection.data import DetectionData, Labelled

__all__ = ["SPLITS", "scene_boxes"]

#: Images in each split.
SPLITS = {"train": 512, "val": 128, "test": 256}


def scene_boxes(name: str, split: str) -> DetectionData:
    """Return one split of drawn scenes with boxes.

    Args:
        name: ``scenes/<task>`` or ``scenes/<task>@<style>``; the tasks are :data:`BOX_TASKS`.
        split: ``"train"``, ``"val"`` or ``"test"``.

    Raises:
        DataError: If the name is of another kind.
        UnknownNameError: For an unknown task, style or split.
    """
    check("split", split, SPLITS)
    kind, _, rest = name.partition("/")
    task, _, style = rest.partition("@")
    if kind != "scenes":
        known = ", ".join(f"scenes/{t}" for t in BOX_TASKS)
        raise DataError(f"unknown detection data {name!r}: {known}, each with @STYLE, or coco:JSON:FOLDER.")
    wanted = box_classes(task)
    scenes = BoxScenes(SPLITS[split], task, split, style or "plain")
    objects = []
    for i in range(len(scenes)):
        image, boxes, items = scenes.boxes(i)
        found = [
            (box, k)
            for box, item in zip(boxes, items, strict=True)
            for k, (shape, colour) in enumerate(wanted.values())
            if item.shape == shape and colour in (None, item.colour) and box[2] > box[0]
        ]
        objects.append(
            Labelled(
                np.array([b for b, _ in found], np.float32).reshape(-1, 4),
                np.array([k for _, k in found], np.int64),
                np.zeros(len(found), bool),
                (image.shape[1], image.shape[0]),
            )
        )
    return DetectionData(
        name,
        tuple(wanted),
        tuple(objects),
        lambda i: Image.fromarray(scenes.boxes(i)[0]),
        ("a photo of a {}.", "a {}."),
    )
