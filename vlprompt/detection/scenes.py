"""Detection on drawn scenes: ``scenes/shape``, ``scenes/shape_colour``, each in every style (``...@sketch``)."""

from __future__ import annotations

from PIL import Image

from vlprompt.core.errors import DataError
from vlprompt.data.scenes.attributes import STYLES, check
from vlprompt.data.scenes.boxes import BOX_TASKS, BoxScenes, box_classes
from vlprompt.detection.data import DetectionData, ImageObjects

__all__ = ["SPLITS", "check_scene_name", "scene_boxes"]

#: Images in each split.
SPLITS = {"train": 512, "val": 128, "test": 256}

_TEMPLATES = ("a photo of a {}.", "a {}.")


def check_scene_name(name: str) -> tuple[str, str]:
    """Return task and style of a name; nothing is drawn.

    Args:
        name: ``scenes/<task>`` or ``scenes/<task>@<style>``; the tasks are :data:`BOX_TASKS`.

    Raises:
        DataError: If the name is of another kind.
        UnknownNameError: For an unknown task or style.
    """
    kind, _, rest = name.partition("/")
    task, _, style = rest.partition("@")

    if kind != "scenes":
        names = ", ".join(f"scenes/{task}" for task in BOX_TASKS)
        raise DataError(f"unknown detection data {name!r}: {names}, each with @STYLE, or coco:JSON:FOLDER.")

    check("detection task", task, BOX_TASKS)
    check("style", style or "plain", STYLES)
    return task, style or "plain"


def scene_boxes(name: str, split: str) -> DetectionData:
    """Return one split of drawn scenes with boxes.

    Args:
        name: See :func:`check_scene_name`.
        split: ``"train"``, ``"val"`` or ``"test"``.

    Raises:
        DataError: If the name is of another kind.
        UnknownNameError: For an unknown task, style or split.
    """
    check("split", split, SPLITS)
    task, style = check_scene_name(name)
    classes = box_classes(task)
    scenes = BoxScenes(SPLITS[split], task, split, style)

    objects = []
    for i in range(len(scenes)):
        pixels, boxes, items = scenes.boxes(i)
        labelled = []
        for box, item in zip(boxes, items, strict=True):
            if box[2] <= box[0]:  # hidden behind other objects
                continue
            for label, (shape, colour) in enumerate(classes.values()):
                if item.shape == shape and colour in (None, item.colour):
                    labelled.append((box, label, False))
        height, width = pixels.shape[:2]
        objects.append(ImageObjects.of(labelled, (width, height)))

    return DetectionData(
        name=name,
        classnames=tuple(classes),
        objects=tuple(objects),
        image=lambda i: Image.fromarray(scenes.boxes(i)[0]),
        templates=_TEMPLATES,
    )
