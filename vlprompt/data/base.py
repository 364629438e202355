"""What every data set looks like: samples, class names, templates and a reader of pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from PIL import Image

from vlprompt.errors import DataError

__all__ = ["ImageDataset", "Reader", "Sample", "hash_strings"]


class Reader(Protocol):
    """Turns a sample's source into pixels; one per kind of storage."""

    def read(self, source: Any) -> Image.Image:
        """Return the picture as RGB. Raises DataError with the source's name if it can't be decoded."""

    def key(self, source: Any) -> str:
        """Return a string that changes exactly when the picture's bytes change; feature caches rely on it."""


@dataclass(frozen=True)
class Sample:
    """One picture and its class: ``source`` means something to the reader only."""

    source: Any
    label: int


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
        return self.reader.read(sample.source), sample.label

    def key(self, index: int) -> str:
        """Return the content key of one picture (see :meth:`Reader.key`)."""
        return self.reader.key(self.samples[index].source)

    @property
    def labels(self) -> list[int]:
        """The label of every sample, in order, without reading a picture."""
        return [s.label for s in self.samples]

    def subset(self, indices: Iterable[int], /, **info: Any) -> ImageDataset:
        """Return the same data set restricted to some samples, in the order given."""
        chosen = tuple(self.samples[i] for i in indices)
        return replace(self, samples=chosen, info={**self.info, **info})

    def keep_classes(self, classes: Sequence[int], /, **info: Any) -> ImageDataset:
        """Return only the samples of some classes, relabelled 0..len(classes)-1 in the order given.

        Raises:
            DataError: If a class index does not exist.
        """
        if bad := [c for c in classes if not 0 <= c < len(self.classnames)]:
            raise DataError(
                f"{self.name}: no class with index {bad[0]}; it has {len(self.classnames)} classes."
            )
        new_label = {old: new for new, old in enumerate(classes)}
        samples = tuple(Sample(s.source, new_label[s.label]) for s in self.samples if s.label in new_label)
        names = tuple(self.classnames[c] for c in classes)
        return replace(self, samples=samples, classnames=names, info={**self.info, **info})

    def fingerprint(self) -> dict[str, str]:
        """Return short hashes of the class names and templates, recorded with every result."""
        return {
            "classnames_hash": hash_strings(self.classnames),
            "templates_hash": hash_strings(self.templates),
        }


def hash_strings(strings: Iterable[str]) -> str:
    """Return 12 hex digits that identify a list of strings and its order."""
    return hashlib.sha256("\x1f".join(strings).encode()).hexdigest()[:12]
