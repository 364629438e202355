"""arrays: data sets that keep all images of a part in one file, read without unpickling anything.

CIFAR's binary version, MNIST's idx, SVHN's MATLAB, STL-10's raw bytes, PatchCamelyon's HDF5 and FER2013's table.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from pydantic import Field

from vlprompt.core.errors import DataError
from vlprompt.core.names import clean_classname
from vlprompt.data.base import ImageDataset, Reader, Sample
from vlprompt.data.images import file_stamp
from vlprompt.data.sources import Request, sources
from vlprompt.data.sources._layout import Layout, Parts, absent, dataset_from, parse_options
from vlprompt.data.splits import cut

__all__ = ["ArrayReader", "build"]

Array = np.ndarray[Any, Any]
Format = Literal["cifar", "idx", "svhn", "stl", "h5", "fer"]


class _Options(Layout):
    """Source options of a card.

    Attributes:
        format: How the files are written.
        parts: Files of each part, relative to the folder; images and labels where those are two files. For FER2013
            the table and the value of its column Usage.
        names_file: The data set's own class names, one a line, in the order of its numbers; they say which number
            is which class of the card.
        own_numbers: The data set's number of each class, by label of the card, if there is no such file.
        shares: Shares of ``train`` that become val and train, where there is no official val.
    """

    format: Format
    parts: dict[Literal["train", "val", "test"], tuple[str, ...]]
    names_file: str | None = None
    own_numbers: tuple[int, ...] = ()
    shares: dict[Literal["val", "train"], float] = Field(default_factory=dict)


@dataclass(frozen=True)
class ArrayReader(Reader):
    """Reads image number ``source`` of a part.

    Attributes:
        format: How the files are written.
        files: Images, and labels where they are a file of their own (or FER2013's value of Usage).
    """

    format: Format
    files: tuple[Path, ...]

    def read(self, source: int) -> Image.Image:
        """Return the image as RGB."""
        return Image.fromarray(self._pixels(source)).convert("RGB")

    def key(self, source: int) -> str:
        """Return ``pixels:`` and the sha256 of shape and pixels."""
        pixels = self._pixels(source)
        return f"pixels:{hashlib.sha256(str(pixels.shape).encode() + pixels.tobytes()).hexdigest()}"

    def stamp(self, source: int) -> str:
        """See :meth:`Reader.stamp`: those of the files, and the image's number."""
        return f"{':'.join(file_stamp(file) for file in self.files)}@{source}"

    def labels(self) -> list[int]:
        """Return the data set's own class number of every image, from 0."""
        return [int(x) for x in _load(self.format, self.files)[1]]

    def _pixels(self, index: int) -> Array:
        return np.ascontiguousarray(_load(self.format, self.files)[0][index])


@sources.register("arrays", summary="images kept in arrays: CIFAR, MNIST, SVHN, STL-10, PCAM, FER2013")
def build(request: Request) -> ImageDataset:
    """Build one split of a card's data set.

    Raises:
        AbsentError: If its files aren't there.
        DataError: If they are damaged or their classes aren't the card's.
    """
    card = request.need_card
    options = parse_options(request, _Options)
    folder = _folder(request, options)
    label_of = _label_of(card.name, card.classnames, options, folder)

    if request.split == "val" and options.shares:
        files = options.parts["train"]
    elif request.split in options.parts:
        files = options.parts[request.split]
    else:
        return dataset_from(request, dict.fromkeys(options.parts, ()), card.classnames, "", folder)

    reader = ArrayReader(options.format, tuple(folder / f for f in files))
    labels = [label_of.get(x, -1) for x in reader.labels()]
    if -1 in labels:
        raise DataError(f"{card.name}: image {labels.index(-1)} of {files[0]} has a class the card lacks.")

    parts: Parts = {request.split: tuple(Sample(i, label) for i, label in enumerate(labels))}
    how = f"official parts: {', '.join(files)}"
    if options.shares and request.split != "test":
        parts = _cut(card.name, card.classnames, options, labels)
        how = f"{how}; {card.splits.otherwise}"

    return dataset_from(request, parts, card.classnames, how, reader)


def _folder(request: Request, options: _Options) -> Path:
    """Return the first folder that holds the files of the split (those of train, for a val cut from it)."""
    split = request.split if request.split in options.parts else "train"
    files = options.parts[split]
    needed = files[:1] if options.format == "fer" else files
    for folder in options.folders:
        if all((request.root / folder / f).is_file() for f in needed):
            return request.root / folder
    raise absent(request, [str(Path(folder) / files[0]) for folder in options.folders])


def _label_of(name: str, classnames: Sequence[str], options: _Options, folder: Path) -> dict[int, int]:
    """Return the card's label of each of the data set's own class numbers."""
    if options.names_file is None:
        numbers = options.own_numbers or range(len(classnames))
        return {number: label for label, number in enumerate(numbers)}

    path = folder / options.names_file
    if not path.is_file():
        raise DataError(f"{name}: {path} is missing; it says which number is which class.")

    lines = [
        clean_classname(x).casefold() for x in path.read_text(encoding="utf-8").splitlines() if x.strip()
    ]
    wanted = [clean_classname(c).casefold() for c in classnames]
    if sorted(lines) != sorted(wanted):
        strange = sorted(set(lines) ^ set(wanted))
        raise DataError(f"{name}: {path} has other classes than the card: {', '.join(strange[:6])}.")

    return {lines.index(c): label for label, c in enumerate(wanted)}


def _cut(name: str, classnames: Sequence[str], options: _Options, labels: list[int]) -> Parts:
    groups: dict[int, list[str]] = {}
    for index, label in enumerate(labels):
        groups.setdefault(label, []).append(f"{index:07d}")
    parts = cut(groups, {str(k): v for k, v in options.shares.items()}, name, classnames)
    return {part: tuple(Sample(int(s.source), s.label) for s in samples) for part, samples in parts.items()}


def _load(kind: Format, files: tuple[Path, ...]) -> tuple[Any, Array]:
    """Return images, indexed by number, each (H, W, 3) or (H, W) bytes, and own class numbers from 0, (N,)."""
    # The modification times are part of the cache's key: a file that was replaced is read again.
    stamps = tuple(f.stat().st_mtime_ns for f in files if f.is_file())
    return _load_once(kind, files, stamps)


@lru_cache(maxsize=4)
def _load_once(kind: Format, files: tuple[Path, ...], stamps: tuple[int, ...]) -> tuple[Any, Array]:
    try:
        images, labels = _LOADERS[kind](files)
    except (OSError, ValueError, KeyError, IndexError, EOFError, zlib.error, TypeError) as error:
        raise DataError(f"can't read {files[0]} as {kind}: {error}.") from None
    if len(images) != len(labels):
        raise DataError(f"{files[0]}: {len(images)} images, but {len(labels)} labels.")
    return images, labels


def _cifar(files: tuple[Path, ...]) -> tuple[Array, Array]:
    """Records of 1 label byte (CIFAR-10) or 2 (CIFAR-100: coarse, fine), then 3 planes of 32 x 32."""
    batches = []
    for file in files:
        raw = np.fromfile(file, dtype=np.uint8)
        head = next((h for h in (1, 2) if raw.size and raw.size % (3072 + h) == 0), 0)
        if not head:
            raise DataError(
                f"{file} is not in CIFAR's binary format (the python version is pickled: not read)."
            )
        batches.append(raw.reshape(-1, 3072 + head))

    records = np.concatenate(batches)
    head = records.shape[1] - 3072
    return records[:, head:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), records[:, head - 1].astype(int)


def _idx(files: tuple[Path, ...]) -> tuple[Array, Array]:
    """MNIST: big-endian header (0, 0, type, dimensions), sizes, bytes; gzipped or not."""

    def read(file: Path) -> Array:
        raw = file.read_bytes()
        raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
        if raw[:3] != b"\0\0\x08":
            raise ValueError("no idx file of bytes")
        sizes = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(sizes)

    return read(files[0]), read(files[1]).astype(int)


def _svhn(files: tuple[Path, ...]) -> tuple[Array, Array]:
    """``X`` (32, 32, 3, N) and ``y`` (N, 1), where 10 means the digit 0."""
    from scipy.io import loadmat

    content = loadmat(str(files[0]))
    return np.moveaxis(content["X"], 3, 0), content["y"].reshape(-1).astype(int) % 10


def _stl(files: tuple[Path, ...]) -> tuple[Array, Array]:
    """Bytes (N, 3, 96, 96), columns before rows, and labels from 1."""
    images = np.fromfile(files[0], dtype=np.uint8).reshape(-1, 3, 96, 96)
    return images.transpose(0, 3, 2, 1), np.fromfile(files[1], dtype=np.uint8).astype(int) - 1


def _h5(files: tuple[Path, ...]) -> tuple[Any, Array]:
    """PatchCamelyon: ``x`` (N, 96, 96, 3), read image by image, and ``y`` (N, 1, 1, 1)."""
    try:
        import h5py
    except ImportError:
        raise DataError(f"reading {files[0].name} needs h5py: pip install 'vlprompt[arrays]'.") from None
    return h5py.File(files[0], "r")["x"], np.asarray(h5py.File(files[1], "r")["y"]).reshape(-1).astype(int)


def _fer(files: tuple[Path, ...]) -> tuple[Array, Array]:
    """FER2013's table: emotion, 48 x 48 grey values as text, Usage; the second "file" is the Usage that is wanted."""
    usage = files[1].name
    with files[0].open(encoding="utf-8", newline="") as lines:
        rows = [r for r in csv.DictReader(lines, skipinitialspace=True) if r["Usage"].strip() == usage]
    images = [np.array(r["pixels"].split(), dtype=np.uint8).reshape(48, 48) for r in rows]
    return np.stack(images), np.array([int(r["emotion"]) for r in rows])


_LOADERS = {"cifar": _cifar, "idx": _idx, "svhn": _svhn, "stl": _stl, "h5": _h5, "fer": _fer}
