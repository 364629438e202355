"""Images with boxes, and files of them in COCO's format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from vlprompt.core.errors import DataError
from vlprompt.core.files import write_atomic, write_json
from vlprompt.core.paths import user_path
from vlprompt.core.seeding import numpy_rng
from vlprompt.data.coco import read_coco_file
from vlprompt.data.decoding import read_image
from vlprompt.detection.boxes import Target

__all__ = ["DetectionData", "ImageObjects", "read_coco", "write_coco"]


@dataclass(frozen=True)
class ImageObjects:
    """The objects of one image.

    Attributes:
        boxes: (T, 4) x0, y0, x1, y1 in pixels.
        labels: (T,) class numbers.
        crowd: (T,) whether a box stands for many objects. Such a box is not trained on, and in scoring it is no mistake
            to detect it or to miss it.
        size: Width and height of the image in pixels.
    """

    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    crowd: NDArray[np.bool_]
    size: tuple[int, int]

    @classmethod
    def of(cls, objects: Sequence[tuple[Any, int, bool]], size: tuple[int, int]) -> ImageObjects:
        """Return the objects of an image.

        Args:
            objects: (box, class number, whether it is a crowd) of each.
            size: Width and height in pixels.
        """
        return cls(
            np.array([box for box, _, _ in objects], np.float32).reshape(-1, 4),
            np.array([label for _, label, _ in objects], np.int64),
            np.array([crowd for _, _, crowd in objects], bool),
            size,
        )

    def target(self) -> Target:
        """Return what a loss reads: without crowds, boxes as centre and sides in fractions."""
        single = ~self.crowd
        sides = torch.tensor([*self.size, *self.size])
        x0, y0, x1, y1 = (torch.from_numpy(self.boxes[single]).float() / sides).T
        boxes = torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], -1)
        return {"labels": torch.from_numpy(self.labels[single]), "boxes": boxes.reshape(-1, 4)}


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
    objects: tuple[ImageObjects, ...]
    image: Callable[[int], Image.Image]
    templates: tuple[str, ...] = ("a photo of a {}.",)

    def __len__(self) -> int:
        return len(self.objects)

    def few(self, images: int | None, seed: int) -> DetectionData:
        """Return a seeded draw of the images.

        Args:
            images: How many; None for all.
            seed: Of the draw.

        Raises:
            DataError: If there are fewer, or none is asked for.
        """
        if images is None:
            return self
        if images < 1:
            raise DataError(f"{self.name}: at least one image must be drawn, {images} were asked for.")
        if images > len(self):
            raise DataError(f"{self.name} has {len(self)} images, {images} were asked for.")

        rng = numpy_rng(seed, "detection", self.name, images)
        drawn = [int(i) for i in rng.permutation(len(self))[:images]]
        objects = tuple(self.objects[i] for i in drawn)
        return replace(self, objects=objects, image=lambda i: self.image(drawn[i]))


def read_coco(annotations: str | Path, images: str | Path) -> DetectionData:
    """Read a data set in COCO's format; see :func:`vlprompt.data.coco.read_coco_file` for what is refused.

    Args:
        annotations: The JSON file: ``images``, ``annotations``, ``categories``.
        images: Folder of the images.

    Raises:
        DataError: If the file is not of that format, refers to what isn't there, or does not fit the images.
    """
    path = user_path(annotations)
    folder = user_path(images)
    file = read_coco_file(path, folder, boxes=True)
    entries = tuple(
        ImageObjects.of([(item.box, item.label, item.crowd) for item in entry.objects], entry.size)
        for entry in file.images
    )
    return DetectionData(
        name=path.stem,
        classnames=file.classnames,
        objects=entries,
        image=lambda i: read_image(folder / file.images[i].name),
    )


def write_coco(data: DetectionData, folder: str | Path) -> Path:
    """Write a data set in COCO's format: ``annotations.json``, and PNG images beside it.

    Args:
        data: What to write.
        folder: Where to.

    Returns:
        The path of the JSON file.
    """
    entries: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i, objects in enumerate(data.objects):
        name = f"{i:06d}.png"
        width, height = objects.size
        _write_png(user_path(folder) / name, data.image(i))
        entries.append({"id": i, "file_name": name, "width": width, "height": height})

        for box, label, crowd in zip(objects.boxes.tolist(), objects.labels, objects.crowd, strict=True):
            x0, y0, x1, y1 = box
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i,
                    "category_id": int(label) + 1,
                    "iscrowd": int(crowd),
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                }
            )

    categories = [{"id": label + 1, "name": name} for label, name in enumerate(data.classnames)]
    path = user_path(folder) / "annotations.json"
    write_json(path, {"images": entries, "annotations": annotations, "categories": categories})
    return path


def _write_png(path: Path, image: Image.Image) -> None:
    write_atomic(path, lambda temporary: image.save(temporary, format="PNG"))
