"""BASE-c:KIND:SEVERITY: another data set with a common corruption in its images (see ``vlprompt.data.corruptions``).

Every image is brought to a square of 224 pixels first, for which the numbers of the corruptions are made: the shorter
side to 256 and the middle cut out, as ImageNet-C was made; drawn images, whose objects reach the border, are kept
whole. Severity 0 is that square as it is.

CIFAR-10-C and CIFAR-100-C have other numbers, made for 32 pixels, and are published as files. Their names read those
files.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from PIL import Image
from pydantic import Field

from vlprompt.core.errors import DataError
from vlprompt.data.base import ImageDataset, Reader, Sample
from vlprompt.data.cards import load_card
from vlprompt.data.catalog import open_split
from vlprompt.data.corruptions import SEVERITIES, SIZE, CorruptionName, corrupt, parse_corruption
from vlprompt.data.images import file_stamp
from vlprompt.data.names import parse_name
from vlprompt.data.sources import AbsentError, Request, sources

__all__ = ["CorruptedReader", "PublishedReader", "build"]

_RECIPE = "1"  # goes into every key: change it when a corruption makes other pixels
_CROP = SIZE / 256  # of the shorter side
_PUBLISHED = {"cifar10": "CIFAR-10-C", "cifar100": "CIFAR-100-C"}  # data set to the folder of its files


@dataclass(frozen=True)
class CorruptedReader(Reader):
    """Reads images of another data set as squares of 224 pixels, with a corruption.

    Attributes:
        base: Reads the images themselves.
        kind: See :data:`vlprompt.data.corruptions.CORRUPTIONS`.
        severity: 0 to 5.
        seed: Of the corruption's draws.
        crop: Share of the shorter side that the square keeps.
        jpeg: Quality of JPEG that the result goes through; 0 for none.
    """

    base: Reader
    kind: str
    severity: int
    seed: int = 0
    crop: float = _CROP
    jpeg: int = 0

    def read(self, source: Any) -> Image.Image:
        """Return the image as RGB, 224 x 224."""
        square = _square(self.base.read(source), self.crop)
        key = self.base.key(source)
        pixels = corrupt(np.asarray(square), self.kind, self.severity, seed=self.seed, key=key)
        image = Image.fromarray(pixels)
        if not self.jpeg:
            return image

        data = io.BytesIO()
        image.save(data, "JPEG", quality=self.jpeg)
        with Image.open(data) as compressed:
            return compressed.convert("RGB")

    def with_jpeg_side(self, side: int) -> CorruptedReader:
        """See :meth:`Reader.with_jpeg_side`."""
        return replace(self, base=self.base.with_jpeg_side(side))

    def key(self, source: Any) -> str:
        """See :meth:`Reader.key`."""
        return f"{self.base.key(source)}|{self._change}"

    def stamp(self, source: Any) -> str:
        """See :meth:`Reader.stamp`."""
        return f"{self.base.stamp(source)}|{self._change}"

    def check(self, source: Any) -> str:
        """See :meth:`Reader.check`."""
        return self.base.check(source)

    def note(self, source: Any) -> str:
        """See :meth:`Reader.note`."""
        return self.base.note(source)

    @property
    def _change(self) -> str:
        return f"corrupted{_RECIPE}:{self.kind}:{self.severity}:{self.seed}:{self.crop:g}:{self.jpeg}"


@dataclass(frozen=True)
class PublishedReader(Reader):
    """Reads image number ``source`` of a published file of corrupted images.

    Attributes:
        file: (N, 32, 32, 3) bytes, the test images five times, severity by severity.
    """

    file: Path

    def read(self, source: int) -> Image.Image:
        """Return the image as RGB."""
        return Image.fromarray(np.asarray(_array(self.file)[source]))

    def key(self, source: int) -> str:
        """Return ``pixels:`` and the sha256 of the pixels."""
        return f"pixels:{hashlib.sha256(np.asarray(_array(self.file)[source]).tobytes()).hexdigest()}"

    def stamp(self, source: int) -> str:
        """See :meth:`Reader.stamp`: that of the file, and the image's number."""
        return f"{file_stamp(self.file)}@{source}"


@sources.register(
    "corrupted", summary="another data set with corrupted images", grammar="BASE-c:KIND:SEVERITY"
)
def build(
    request: Request,
    *,
    corruption_seed: int = 0,
    crop: Annotated[float, Field(gt=0, le=1)] | None = None,
    jpeg: Annotated[int, Field(ge=0, le=95)] = 0,
) -> ImageDataset:
    """Build one split.

    Args:
        request: ``argument`` is the whole name.
        corruption_seed: Of the draws; an image has the same corruption wherever and whenever it is read.
        crop: Share of the shorter side that the square keeps; None is 224/256, and 1 for drawn images.
        jpeg: Quality of JPEG that the result goes through, 85 as ImageNet-C's files; 0 for none.
    """
    name = parse_corruption(request.argument)
    assert name is not None  # it would not have come here
    if name.base in _PUBLISHED:
        return _published(request, name)

    base = open_split(name.base, request.split, request.root)
    if crop is None:
        crop = 1.0 if parse_name(name.base).embedded else _CROP
    reader = CorruptedReader(base.reader, name.kind, name.severity, corruption_seed, crop, jpeg)
    info = {
        **base.info,
        "corruption": name.kind,
        "severity": name.severity,
        "corruption_seed": corruption_seed,
        "crop": crop,
        "jpeg": jpeg,
    }
    return replace(base, name=request.name, reader=reader, info=info)


def _published(request: Request, name: CorruptionName) -> ImageDataset:
    """Return the published images of a corruption, which are those of the test split.

    Raises:
        AbsentError: If the files aren't there.
        DataError: If another split is asked for, or the files are damaged.
    """
    folder = request.root / _PUBLISHED[name.base]
    if request.split != "test" or not name.severity:
        raise DataError(
            f"{name.base}: {folder.name} has the test split alone, at severities 1 to {SEVERITIES[-1]}; got the split "
            f"{request.split!r} and severity {name.severity}. {name.base} itself has the others."
        )

    file = folder / f"{name.kind}.npy"
    labels_file = folder / "labels.npy"
    for path in (file, labels_file):
        if not path.is_file():
            raise AbsentError(
                f"{request.name}: {path} does not exist. Unpack the published {folder.name} into {request.root}; its "
                "images are no others', for its corruptions are made for 32 pixels."
            )

    images = _array(file)
    labels = _array(labels_file)
    count = len(labels) // len(SEVERITIES)
    is_complete = images.ndim == 4 and images.dtype == np.uint8 and len(images) == len(labels)
    if not is_complete or len(labels) % len(SEVERITIES) or labels.ndim != 1:
        raise DataError(
            f"{file} and {labels_file.name} should hold (N, 32, 32, 3) bytes and N labels, five severities of the test "
            f"images; got {images.dtype} {images.shape} and {labels.shape}."
        )

    card = load_card(name.base)
    first = (name.severity - 1) * count
    samples = _samples(labels[first : first + count], first, len(card.classnames), labels_file)
    info = {"source": folder.name, "corruption": name.kind, "severity": name.severity, "metric": card.metric}
    return ImageDataset(
        request.name, "test", samples, card.classnames, card.templates, PublishedReader(file), info
    )


def _samples(labels: np.ndarray[Any, Any], first: int, classes: int, file: Path) -> tuple[Sample, ...]:
    numbers = [int(label) for label in labels]
    wrong = [number for number in numbers if not 0 <= number < classes]
    if wrong:
        raise DataError(f"{file} has the label {wrong[0]}, but there are {classes} classes, from 0.")
    return tuple(Sample(first + row, label) for row, label in enumerate(numbers))


def _square(image: Image.Image, crop: float) -> Image.Image:
    """Return the middle of an image as RGB, 224 x 224, bilinear."""
    side = crop * min(image.size)
    left = (image.width - side) / 2
    top = (image.height - side) / 2
    box = (left, top, left + side, top + side)
    return image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR, box)


def _array(file: Path) -> np.ndarray[Any, Any]:
    """Return a file's array, read from the disk where it is looked at."""
    return _mapped(file, file.stat().st_mtime_ns)


@lru_cache(maxsize=4)
def _mapped(file: Path, changed: int) -> np.ndarray[Any, Any]:
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"can't read {file} as an array of NumPy: {error}.") from None
