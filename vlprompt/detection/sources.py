"""Data sets of boxes by name: drawn scenes, or files in COCO's format."""

from __future__ import annotations

from pathlib import Path

from vlprompt.core.files import path_fingerprint
from vlprompt.core.paths import user_path
from vlprompt.detection.data import DetectionData, read_coco
from vlprompt.detection.scenes import check_scene_name, scene_boxes

__all__ = ["boxes_fingerprint", "check_boxes_name", "has_splits", "load_boxes", "missing_boxes"]

_COCO = "coco:"
_SPLIT = "{split}"


def load_boxes(name: str, split: str) -> DetectionData:
    """Return one split of a data set.

    Args:
        name: ``scenes/TASK[@STYLE]``, or ``coco:JSON[:FOLDER]``, where ``FOLDER`` has the images (that of the JSON file
            unless it is named). ``{split}`` in either path stands for the split; without it, every split is the same.
        split: ``"train"``, ``"val"`` or ``"test"``.

    Raises:
        DataError: If the name is of no known kind, or the files are not what they should be.
        UnknownNameError: For unknown drawn scenes.
    """
    if not name.startswith(_COCO):
        return scene_boxes(name, split)
    annotations, folder = _coco_paths(name, split)
    return read_coco(annotations, folder)


def check_boxes_name(name: str) -> None:
    """Refuse a name that no data set has; files are not looked for.

    Raises:
        DataError: If the name is of no known kind.
        UnknownNameError: For unknown drawn scenes.
    """
    if not name.startswith(_COCO):
        check_scene_name(name)


def has_splits(name: str) -> bool:
    """Return whether a data set has other images in each split."""
    return not name.startswith(_COCO) or _SPLIT in name


def boxes_fingerprint(name: str, split: str) -> str:
    """Return what changes when a file of a split changes; empty for drawn scenes."""
    if not name.startswith(_COCO):
        return ""
    annotations, folder = _coco_paths(name, split)
    return f"{path_fingerprint(annotations)}-{path_fingerprint(folder)}"


def missing_boxes(name: str, split: str) -> str | None:
    """Return which file of a split is missing, as a sentence; None if nothing is."""
    if not name.startswith(_COCO):
        return None
    for path in _coco_paths(name, split):
        if not path.exists():
            return f"{name}: {path} does not exist."
    return None


def _coco_paths(name: str, split: str) -> tuple[Path, Path]:
    """Return the annotations' file and the images' folder."""
    annotations, _, folder = name.removeprefix(_COCO).replace(_SPLIT, split).partition(":")
    path = user_path(annotations)
    return path, user_path(folder) if folder else path.parent
