"""What every segmentation data set looks like: pairs of an image and a phrase, each with a mask."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlprompt.core.options import check_type
from vlprompt.data.base import Reader, hash_strings

__all__ = ["IGNORE", "MaskDataset", "MaskReader", "MaskSample", "MaskedImage", "check_pairs"]

IGNORE = 255
"""Value of pixels that count neither for nor against a prediction; 0 is ground, 1 is what the phrase means."""


@dataclass(frozen=True)
class MaskSample:
    """One image and one phrase.

    Attributes:
        source: The image; means something to the reader only, as in :class:`vlprompt.data.base.Sample`.
        masks: Where its mask is: several files are united, none means that the phrase fits nothing in the image.
        phrase: What is asked for.
        label: Number of its class.
        record: Name of the pair: unique in the data set, and what every draw about it is seeded with.
        values: Pixel values that mean the class in a mask of many classes; empty where masks are binary.
    """

    source: Any
    masks: tuple[Any, ...]
    phrase: str
    label: int
    record: str
    values: tuple[int, ...] = ()


@dataclass(frozen=True)
class MaskedImage:
    """A pair as it is read.

    Attributes:
        image: RGB.
        mask: (H, W) uint8 at the image's size: 1 inside, 0 outside, 255 where it doesn't count.
        phrase: What is asked for.
        label: Number of its class.
        record: Name of the pair.
    """

    image: Image.Image
    mask: NDArray[np.uint8]
    phrase: str
    label: int
    record: str


class MaskReader(Reader):
    """Reads images as every data set does, and masks."""

    @abstractmethod
    def mask(self, sample: MaskSample, size: tuple[int, int]) -> NDArray[np.uint8]:
        """Return the mask of an image of ``size`` (width, height).

        Raises:
            DataError: If it doesn't fit or can't be read.
        """

    def mask_stamp(self, sample: MaskSample) -> str:
        """Return a string that changes when the pair's mask is written again (see :meth:`Reader.stamp`).

        The default is empty: the image's stamp says enough where both are drawn.
        """
        return ""


@dataclass(frozen=True)
class MaskDataset:
    """A segmentation data set; indexing gives a :class:`MaskedImage`.

    Attributes:
        name: Catalogue name, for example ``"kvasir_seg"``.
        split: ``"train"``, ``"val"`` or ``"test"``.
        samples: Pairs in a fixed order; those of one image follow each other.
        classnames: C names.
        reader: Reads images and masks.
        info: Facts that results must record (where it came from, how it was split, what was changed).
    """

    name: str
    split: str
    samples: tuple[MaskSample, ...]
    classnames: tuple[str, ...]
    reader: MaskReader
    info: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> MaskedImage:
        sample = self.samples[index]
        image = self.reader.read(sample.source)
        mask = self.reader.mask(sample, image.size)
        return MaskedImage(image, mask, sample.phrase, sample.label, sample.record)

    def key(self, index: int) -> str:
        """Return the content key of one image (see :meth:`vlprompt.data.base.Reader.key`)."""
        return self.reader.key(self.samples[index].source)

    def images(self) -> dict[Any, list[int]]:
        """Return the pairs of every image, by its source, in order."""
        pairs_of: dict[Any, list[int]] = {}
        for index, sample in enumerate(self.samples):
            pairs_of.setdefault(sample.source, []).append(index)
        return pairs_of

    def subset(self, indices: Iterable[int], /, **info: Any) -> MaskDataset:
        """Return the same data set restricted to some pairs, in the order given."""
        chosen = tuple(self.samples[i] for i in indices)
        return replace(self, samples=chosen, info={**self.info, **info})

    def with_samples(self, samples: Iterable[MaskSample], /, **info: Any) -> MaskDataset:
        """Return the same data set with other pairs."""
        return replace(self, samples=tuple(samples), info={**self.info, **info})

    def fingerprint(self) -> dict[str, str]:
        """Return short hashes of the class names, and of all pairs with their phrases."""
        pairs = (f"{s.record}\x1e{s.phrase}" for s in self.samples)
        return {"classnames_hash": hash_strings(self.classnames), "phrases_hash": hash_strings(pairs)}


def check_pairs(data: Any) -> None:
    """Refuse what is no segmentation data set.

    Raises:
        DataError: Says what it is instead.
    """
    check_type(
        data, MaskDataset, "a data set of images, phrases and masks", "vlprompt.load_segmentation(...)"
    )
