"""What every data set looks like: samples, class names, templates and a reader of images."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from vlprompt.core.descriptions import Descriptions, class_texts
from vlprompt.core.errors import DataError

if TYPE_CHECKING:  # readers of names and labels need no torch
    from torch import Tensor

__all__ = ["NO_LABEL", "ImageDataset", "Reader", "Sample", "hash_strings"]

NO_LABEL = -1
"""What stands for the label of an image of a multi-label data set that shows no class for certain."""


class Reader(ABC):
    """Turns a sample's source into pixels; one per kind of storage."""

    @abstractmethod
    def read(self, source: Any) -> Image.Image:
        """Return the image as RGB.

        Raises:
            DataError: If it can't be decoded; names the source.
        """

    @abstractmethod
    def key(self, source: Any) -> str:
        """Return a string that changes exactly when the image's bytes change; feature caches rely on it."""

    def check(self, source: Any) -> str:
        """Return why an image can't be decoded, empty if it can; images that are drawn always can."""
        return ""

    def note(self, source: Any) -> str:
        """Return what decoding changes of an image and a user should know, empty if nothing."""
        return ""

    def caption(self, source: Any) -> str:
        """Return a sentence about the image that was made without its label; empty, where there is none."""
        return ""

    def with_jpeg_side(self, side: int) -> Reader:
        """Return a reader that decodes large JPEGs at a fraction of their size; itself where none are read.

        Args:
            side: Pixels that the shorter side keeps at least (see :func:`vlprompt.data.decoding.read_image`).
        """
        return self

    def exact(self, source: Any) -> Tensor | None:
        """Return (3, H, W) float32 pixels in [0, 1] of an image that bytes can't hold, which :meth:`read` then rounds.

        Attacked images may be such; files of images never are.
        """
        return None

    def stamp(self, source: Any) -> str:
        """Return a string that changes when the image is written again, without reading its bytes.

        Fingerprints of whole data sets are made of stamps, so a stamp must be cheap: for a file, its size and
        modification time. The default is :meth:`key`, which is cheap where images are drawn.
        """
        return self.key(source)


@dataclass(frozen=True)
class Sample:
    """One image and its class, or its classes: ``source`` means something to the reader only.

    Attributes:
        source: Of the image.
        label: Its class; a tuple in multi-label data sets, which may be empty.
        unknown: Further classes of which nobody can say whether the image shows them (objects marked difficult).
    """

    source: Any
    label: int | tuple[int, ...]
    unknown: tuple[int, ...] = ()

    @property
    def classes(self) -> tuple[int, ...]:
        """All classes the image shows; one, but in multi-label data sets."""
        return self.label if isinstance(self.label, tuple) else (self.label,)


@dataclass(frozen=True)
class ImageDataset:
    """A classification data set; indexing gives ``(image, label)``.

    Attributes:
        name: Catalogue name, for example ``"scenes/shape"``.
        split: ``"train"``, ``"val"`` or ``"test"``.
        samples: Sources and labels, in a fixed order.
        classnames: C names; label c means ``classnames[c]``.
        templates: Sentences with one ``{}`` for the class name.
        reader: Reads a sample's source.
        info: Facts that results must record (card, shots, seed, chosen indices, ...).
    """

    name: str
    split: str
    samples: tuple[Sample, ...]
    classnames: tuple[str, ...]
    templates: tuple[str, ...]
    reader: Reader
    info: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        sample = self.samples[index]
        return self.reader.read(sample.source), _first(sample)

    def key(self, index: int) -> str:
        """Return the content key of one image (see :meth:`Reader.key`)."""
        return self.reader.key(self.samples[index].source)

    @property
    def labels(self) -> list[int]:
        """The label of every sample, in order, without reading an image.

        The first one if it has several; :data:`NO_LABEL` if it has none.
        """
        return [_first(sample) for sample in self.samples]

    @property
    def targets(self) -> dict[str, Any]:
        """What is known of every sample, by the key that a learner's batch has for it.

        Where images can have several labels, ``"target"`` holds all of them (see :meth:`multi_hot`).
        """
        return {"label": self.labels, **({"target": self.multi_hot().tolist()} if self.multi_label else {})}

    @property
    def strata(self) -> tuple[list[int], Sequence[str]]:
        """The group of every sample and the names of the groups; shots draw equally many of each group."""
        return self.labels, self.classnames

    @property
    def multi_label(self) -> bool:
        """Whether an image can have several labels."""
        return any(isinstance(s.label, tuple) for s in self.samples)

    def multi_hot(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return 1 where an image shows a class, 0 where it does not, -1 where nobody can say, (n, C)."""
        truth = np.zeros((len(self), len(self.classnames)), dtype=np.int64)
        for row, sample in zip(truth, self.samples, strict=True):
            row[list(sample.unknown)] = -1
            row[list(sample.classes)] = 1
        return truth

    def with_label(self) -> ImageDataset:
        """Return the samples that show a class for certain; the same data set if all do."""
        kept = [i for i, sample in enumerate(self.samples) if sample.classes]
        return self if len(kept) == len(self) else self.subset(kept)

    def one_label_each(self) -> ImageDataset:
        """Return one sample per image and label, which is how losses over single labels learn from several."""
        if not self.multi_label:
            return self
        samples = tuple(Sample(s.source, label) for s in self.samples for label in s.classes)
        return replace(self, samples=samples, info={**self.info, "one_label_each": True})

    def subset(self, indices: Iterable[int], /, **info: Any) -> ImageDataset:
        """Return the same data set restricted to some samples, in the order given.

        ``info["indices"]``, the positions in a whole split that a drawn part records, follows the samples.
        """
        order = list(indices)
        positions = self.info.get("indices")
        followed = {} if positions is None else {"indices": [positions[i] for i in order]}
        samples = tuple(self.samples[i] for i in order)
        return replace(self, samples=samples, info={**self.info, **followed, **info})

    def keep_classes(self, classes: Sequence[int], /, **info: Any) -> ImageDataset:
        """Return only the samples of some classes, relabelled 0..len(classes)-1 in the order given.

        Samples that show no class stay where all classes do.

        Raises:
            DataError: If a class index does not exist.
        """
        bad = [c for c in classes if not 0 <= c < len(self.classnames)]
        if bad:
            raise DataError(
                f"{self.name}: no class with index {bad[0]}; it has {len(self.classnames)} classes."
            )

        new_label = {old: new for new, old in enumerate(classes)}

        def relabel(sample: Sample) -> Sample:
            labels = tuple(new_label[c] for c in sample.classes if c in new_label)
            unknown = tuple(new_label[c] for c in sample.unknown if c in new_label)
            return Sample(sample.source, labels if isinstance(sample.label, tuple) else labels[0], unknown)

        keeps_all = len(new_label) == len(self.classnames)
        remaining = [
            i for i, s in enumerate(self.samples) if keeps_all or not new_label.keys().isdisjoint(s.classes)
        ]
        part = self.subset(remaining, **info)
        names = tuple(self.classnames[c] for c in classes)

        return replace(part, samples=tuple(map(relabel, part.samples)), classnames=names)

    def fingerprint(self) -> dict[str, str]:
        """Return short hashes of the class names and templates, recorded with every result."""
        texts = [text for name in self.classnames for text in class_texts(name, self.templates)]
        described = isinstance(self.templates, Descriptions)
        return {
            "classnames_hash": hash_strings(self.classnames),
            "templates_hash": hash_strings(self.templates),
            **({"descriptions_hash": hash_strings(texts)} if described else {}),
        }


def _first(sample: Sample) -> int:
    return next(iter(sample.classes), NO_LABEL)


def hash_strings(strings: Iterable[str]) -> str:
    """Return 12 hex digits that identify a list of strings and its order."""
    return hashlib.sha256("\x1f".join(strings).encode("utf-8", "surrogatepass")).hexdigest()[:12]
