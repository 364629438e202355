"""Pairs of a data set as a segmentation model takes them; states that training never changes are computed once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlprompt.core.errors import DataError
from vlprompt.data.loading import Loader
from vlprompt.data.segmentation.base import MaskDataset
from vlprompt.data.segmentation.reading import resize_mask
from vlprompt.segmentation.base import Frozen, Segmenter

__all__ = ["PairStates", "ReadImage"]

ReadImage = tuple[Tensor, tuple[int, int]]
"""An image as a model takes it, (3, H, W), and the (width, height) of its file."""


class PairStates:
    """A model's frozen states of a data set's images, kept in memory as far as they fit.

    An image is read, preprocessed and encoded once, whatever the number of its pairs; its masks stay too.

    Args:
        segmenter: The model.
        data: The pairs.
        batch_size: Images encoded at once.
        limit_mb: Megabytes (10^6 bytes) of states to keep; beyond, states are computed when they are asked for.
    """

    def __init__(
        self, segmenter: Segmenter, data: MaskDataset, batch_size: int = 16, limit_mb: float = 2000.0
    ) -> None:
        self.segmenter = segmenter
        self.data = data
        self.batch_size = batch_size
        self.room = limit_mb * 1e6  # bytes
        self.sizes: dict[Any, tuple[int, int]] = {}  # (H, W) of an image as the model sees it
        self._originals: dict[Any, tuple[int, int]] = {}  # (width, height) of the file
        self._states: dict[Any, Frozen] = {}
        self._masks: dict[int, NDArray[np.uint8]] = {}

    def prepare(self) -> bool:
        """Encode every image now; return whether all of them fit."""
        sources = list(self.data.images())
        batches = [
            sources[start : start + self.batch_size] for start in range(0, len(sources), self.batch_size)
        ]
        with Loader(self._read) as loader:
            for batch, images in zip(batches, loader.stream(batches), strict=True):
                self._encode(batch, images)
        return all(source in self._states for source in sources)

    def stream(
        self, batches: Sequence[Sequence[int]]
    ) -> Iterator[tuple[Sequence[int], Frozen, tuple[int, int]]]:
        """Yield the pairs of every batch and what :meth:`frozen` returns of them; images are read ahead."""
        sources = [list(dict.fromkeys(self.data.samples[i].source for i in pairs)) for pairs in batches]
        missing = [[source for source in batch if source not in self._states] for batch in sources]
        with Loader(self._read) as loader:
            for pairs, batch, images in zip(batches, missing, loader.stream(missing), strict=True):
                yield (pairs, *self.frozen(pairs, dict(zip(batch, images, strict=True))))

    def frozen(
        self, pairs: Sequence[int], read: Mapping[Any, ReadImage] | None = None
    ) -> tuple[Frozen, tuple[int, int]]:
        """Return the states of some pairs' images, stacked, and the images' size (H, W).

        Args:
            pairs: Their numbers.
            read: What was read already of the images whose states are not there.

        Raises:
            DataError: If the images have several sizes.
        """
        sources = [self.data.samples[i].source for i in pairs]
        unique = dict.fromkeys(sources)
        states = {source: self._states[source] for source in unique if source in self._states}

        missing = [source for source in unique if source not in states]
        if missing:
            images = self._read(missing) if read is None else [read[source] for source in missing]
            states |= self._encode(missing, images)

        sizes = {self.sizes[source] for source in sources}
        if len(sizes) > 1:
            raise DataError(
                f"{self.data.name}: images of one batch have several sizes ({sorted(sizes)[:3]}); use batch_size 1."
            )

        names = states[sources[0]].keys()
        stacked = {name: torch.stack([states[source][name] for source in sources]) for name in names}
        return stacked, sizes.pop()

    def mask(self, pair: int) -> NDArray[np.uint8]:
        """Return a pair's mask at its own size."""
        if pair in self._masks:
            return self._masks[pair]
        sample = self.data.samples[pair]
        reader = self.data.reader
        if sample.source not in self._originals:
            self._originals[sample.source] = reader.read(sample.source).size

        mask = reader.mask(sample, self._originals[sample.source])
        if self.room >= mask.nbytes:
            self.room -= mask.nbytes
            self._masks[pair] = mask
        return mask

    def targets(self, pairs: Sequence[int], size: tuple[int, int]) -> Tensor:
        """Return (B, h, w) masks at the model's size, by the nearest pixel."""
        masks = [resize_mask(self.mask(i), size[::-1]) for i in pairs]
        return torch.from_numpy(np.stack(masks))

    def _read(self, sources: Sequence[Any]) -> list[ReadImage]:
        """Return the (3, H, W) pixels of images, and the (width, height) of their files."""
        originals = [self.data.reader.read(source) for source in sources]
        return [(self.segmenter.preprocess(original), original.size) for original in originals]

    def _encode(self, sources: Sequence[Any], read: Sequence[ReadImage]) -> dict[Any, Frozen]:
        """Compute states of images of any sizes, and keep them while there is room."""
        images = {}
        for source, (pixels, original) in zip(sources, read, strict=True):
            self._originals[source] = original
            images[source] = pixels

        groups: dict[tuple[int, int], list[Any]] = {}
        for source, image in images.items():
            self.sizes[source] = (int(image.shape[-2]), int(image.shape[-1]))
            groups.setdefault(self.sizes[source], []).append(source)
        states: dict[Any, Frozen] = {}
        for group in groups.values():
            batch = self.segmenter.frozen(torch.stack([images[source] for source in group]))
            for i, source in enumerate(group):
                states[source] = {name: tensor[i] for name, tensor in batch.items()}

        for source, state in states.items():
            size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())  # bytes
            if size <= self.room and source not in self._states:
                self.room -= size
                # A view would keep the whole batch in memory.
                self._states[source] = {name: tensor.clone() for name, tensor in state.items()}
        return states
