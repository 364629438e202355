"""Streams of known images among which others come: of other classes, or of the same classes but corrupted.

The adapters are told nothing. Figures of accuracy are of the known images; scores tell how well both kinds are told
apart.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlprompt.core.errors import DataError
from vlprompt.data import ImageDataset
from vlprompt.data.base import Reader, Sample

__all__ = ["UNKNOWN", "MixedReader", "MixedSource", "intruders_of", "mix"]

UNKNOWN = -1
"""The label of an image that shows none of the classes."""


@dataclass(frozen=True)
class MixedSource:
    """An image of a mixed stream.

    Attributes:
        source: What its own reader reads.
        intruder: Whether it is none of the known images.
    """

    source: Any
    intruder: bool


@dataclass(frozen=True)
class MixedReader(Reader):
    """Reads known images and intruders, each kind by its own reader.

    Attributes:
        known: Of the known images.
        intruders: Of the others.
    """

    known: Reader
    intruders: Reader

    def read(self, source: MixedSource) -> Image.Image:
        """See :meth:`Reader.read`."""
        return self._of(source).read(source.source)

    def key(self, source: MixedSource) -> str:
        """See :meth:`Reader.key`."""
        return self._of(source).key(source.source)

    def stamp(self, source: MixedSource) -> str:
        """See :meth:`Reader.stamp`."""
        return self._of(source).stamp(source.source)

    def check(self, source: MixedSource) -> str:
        """See :meth:`Reader.check`."""
        return self._of(source).check(source.source)

    def note(self, source: MixedSource) -> str:
        """See :meth:`Reader.note`."""
        return self._of(source).note(source.source)

    def _of(self, source: MixedSource) -> Reader:
        return self.intruders if source.intruder else self.known


def mix(known: ImageDataset, intruders: ImageDataset) -> ImageDataset:
    """Return the images of both, the known ones first.

    Intruders of the same classes keep their labels; those of other classes get :data:`UNKNOWN`.

    Raises:
        DataError: If some classes are the same and others are not, so that nobody could say what an intruder is.
    """
    same = known.classnames == intruders.classnames
    shared = sorted(set(known.classnames) & set(intruders.classnames))
    if shared and not same:
        raise DataError(
            f"{known.name} and {intruders.name} have some classes in common ({', '.join(shared[:5])}) and others "
            "not, so an image of the second may be known or not. Take a set of other classes, or of the same ones in "
            "the same order."
        )

    samples = [Sample(MixedSource(sample.source, False), sample.label) for sample in known.samples]
    for sample in intruders.samples:
        samples.append(Sample(MixedSource(sample.source, True), sample.label if same else UNKNOWN))
    info = {key: value for key, value in known.info.items() if key != "indices"}
    return replace(
        known,
        samples=tuple(samples),
        reader=MixedReader(known.reader, intruders.reader),
        info={**info, "intruders": intruders.name},
    )


def intruders_of(data: ImageDataset) -> Tensor:
    """Return the (n,) mask of a stream's images that are intruders."""
    return torch.tensor(
        [isinstance(s.source, MixedSource) and s.source.intruder for s in data.samples], dtype=torch.bool
    )
