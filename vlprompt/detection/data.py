"""Images with boxes: COCO's format, and drawn scenes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from vlprompt.core.errors import DataError
from vlprompt.core.files import write_atomic, write_json
from vlprompt.core.seeding import numpy_rng
from vlprompt.data.images import read_image
from vlprompt.detection.boxes import Target

__all__ = ["DetectionData", "Labelled", "read_coco", "write_coco"]


@dataclass(frozen=True)
class Labelled:
    """An image's objects.

    Attributes:
        boxes: (T, 4) x0 y0 x1 y1 in pixels.
        labels: (T,) numbers of classes.
        crowd: (T,) whether a box stands for many objects: not trained on, and no mistake to find or to miss.
        size: (W, H) of the image in pixels.
    """

    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    crowd: NDArray[np.bool_]
    size: tuple[int, int]

    def target(self) -> Target:
        """Return what a loss reads."""
        kept = ~self.crowd
        x0, y0, x1, y1 = (
            torch.from_numpy(self.boxes[kept]).float() / torch.tensor([*self.size, *self.size])
        ).T
        boxes = torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], -1)
        return {"labels": torch.from_numpy(self.labels[kept]), "boxes": boxes.reshape(-1, 4)}


@dataclass(frozen=True)
class DetectionData:
    """A data set of images with boxes.

    Attributes:
        name: For messages and records.
        classnames: C names.
        objects: One entry per image.
        image: Returns the i-th image.
        templates: Hand-written sentences for the names.
    """

    name: str
    classnames: tuple[str, ...]
    objects: tuple[Labelled, ...]
    image: Callable[[int], Image.Image]
    templates: tuple[str, ...] = ("a photo of a {}.",)

    def __len__(self) -> int:
        return len(self.objects)

    def few(self, images: int | None, seed: int) -> DetectionData:
        """Return a seeded draw of so many images; None: all.

        Raises:
            DataError: If there are fewer, or a class has no object among those drawn.
        """
        if images is None:
            return self
        if images > len(self):
            raise DataError(f"{self.name} has {len(self)} images, {images} were asked for.")
        order = [int(i) for i in numpy_rng(seed, "detection", self.name, images).permutation(len(self))]
        chosen = order[:images]
        return DetectionData(
            self.name,
            self.classnames,
            tuple(self.objects[i] for i in chosen),
            lambda i: self.image(chosen[i]),
            self.templates,
        )


def read_coco(annotations: str | Path, images: str | Path) -> DetectionData:
    """Read a data set in COCO's format. Boxes without area are left out.

    Args:
        annotations: The JSON file: ``images``, ``annotations``, ``categories``.
        images: Folder of the images.

    Raises:
        DataError: If the file is not of that format, or refers to what isn't there; names what.
    """
    path, folder = Path(annotations), Path(images)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        entries = {int(p["id"]): p for p in raw["images"]}
        categories = sorted((int(c["id"]), str(c["name"])) for c in raw["categories"])
        boxes: dict[int, list[Any]] = {i: [] for i in entries}
        numbers = {number: k for k, (number, _) in enumerate(categories)}
        for a in raw["annotations"]:
            where = f"annotation {a.get('id')}"
            if (owner := int(a["image_id"])) not in boxes:
                raise DataError(f"{path}: {where} belongs to image {owner}, which is not listed.")
            if (category := int(a["category_id"])) not in numbers:
                raise DataError(f"{path}: {where} is of category {category}, which is not listed.")
            x, y, w, h = map(float, a["bbox"])
            if w > 0 and h > 0:
                box = (x, y, x + w, y + h)
                boxes[owner].append((box, numbers[category], bool(a.get("iscrowd", 0))))
        files = {i: folder / str(p["file_name"]) for i, p in entries.items()}
        sizes = {i: (int(p["width"]), int(p["height"])) for i, p in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not in COCO's format: {type(error).__name__} {error}.") from error
    if not files or not categories:
        raise DataError(f"{path} lists {len(files)} images and {len(categories)} categories.")
    if missing := [str(f) for f in files.values() if not f.is_file()]:
        raise DataError(f"{path}: {len(missing)} of {len(files)} images are missing, first {missing[0]}.")
    order = list(files)
    objects = tuple(_labelled(boxes[i], sizes[i]) for i in order)
    names = tuple(name for _, name in categories)
    return DetectionData(path.stem, names, objects, lambda i: read_image(files[order[i]]))


def write_coco(data: DetectionData, folder: str | Path) -> Path:
    """Write a data set in COCO's format: ``annotations.json`` and PNG images beside it; return the JSON's path."""
    place = Path(folder)
    entries: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for i, entry in enumerate(data.objects):
        shown = data.image(i)
        write_atomic(place / f"{i:06d}.png", lambda path, image=shown: image.save(path, format="PNG"))  # type: ignore[misc]
        entries.append(
            {"id": i, "file_name": f"{i:06d}.png", "width": entry.size[0], "height": entry.size[1]}
        )
        for box, label, crowd in zip(entry.boxes.tolist(), entry.labels, entry.crowd, strict=True):
            x0, y0, x1, y1 = box
            side = {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0)}
            facts = {"image_id": i, "category_id": int(label) + 1, "iscrowd": int(crowd)}
            found.append({"id": len(found) + 1, **facts, **side})
    categories = [{"id": k + 1, "name": name} for k, name in enumerate(data.classnames)]
    write_json(
        place / "annotations.json", {"images": entries, "annotations": found, "categories": categories}
    )
    return place / "annotations.json"


def _labelled(found: Sequence[tuple[Any, int, bool]], size: tuple[int, int]) -> Labelled:
    return Labelled(
        np.array([f[0] for f in found], np.float32).reshape(-1, 4),
        np.array([f[1] for f in found], np.int64),
        np.array([f[2] for f in found], bool),
        size,
    )
