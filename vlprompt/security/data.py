"""What scanners learn from and are tested on: parts of a data set with triggers, and a suspected set beside them."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlprompt.core.paths import user_path
from vlprompt.core.seeding import numpy_rng
from vlprompt.data import FeatureCache, ImageDataset, load_dataset
from vlprompt.data.compositions import CompositionDataset, composition_dataset
from vlprompt.data.fingerprint import data_fingerprint
from vlprompt.data.transforms import Preprocess
from vlprompt.data.triggers import size_of
from vlprompt.security.config import CompositionOptions, DataOptions, SuspectOptions
from vlprompt.security.poison import PoisonedDataset, PoisonPlan, poisoned

__all__ = ["RowCache", "ScanData"]

_BATCH = 64  # images


class ScanData:
    """One data set under one seed, with triggers.

    Everything is read on first use.

    Args:
        name: Of the data set.
        seed: Of the cut between scanners and suspects, and of all that is drawn.
        data: Where it lies, and which split figures are of.
        compositions: Which triggers are put in, and how.
        suspect: What is poisoned; None for no suspected set.
    """

    def __init__(
        self,
        name: str,
        seed: int,
        data: DataOptions,
        compositions: CompositionOptions,
        suspect: SuspectOptions | None,
    ) -> None:
        self.name = name
        self.seed = seed
        self.options = data
        self.compositions = compositions
        self.suspect = suspect

    def is_same(self, other: ScanData) -> bool:
        """Whether another object stands for the very same images."""
        ours = (self.name, self.seed, self.options, self.compositions, self.suspect)
        theirs = (other.name, other.seed, other.options, other.compositions, other.suspect)
        return ours == theirs

    @cached_property
    def cache(self) -> RowCache:
        """Rows of the image tower for these images; no other data use it."""
        if self.options.cache_dir is None:
            return RowCache()

        facts: list[Any] = [
            self.name,
            data_fingerprint(self.name, self.options.root),
            self.options.split,
            self.seed,
            self.compositions.model_dump(mode="json"),
            None if self.suspect is None else self.plan().model_dump(mode="json"),
        ]
        digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
        return RowCache(user_path(self.options.cache_dir) / digest)

    @cached_property
    def train(self) -> CompositionDataset:
        """Images that scanners learn from, each with several triggers."""
        return self._composed(self._cut[0], self.compositions.copies)

    @cached_property
    def val(self) -> CompositionDataset:
        """Images that scanners choose thresholds on."""
        return self._composed(self._split("val"), 1)

    @cached_property
    def test(self) -> CompositionDataset:
        """Images that figures are of."""
        return self._composed(self.test_images, 1)

    @cached_property
    def test_images(self) -> ImageDataset:
        """The same without triggers."""
        return self._split(self.options.split)

    @cached_property
    def suspects(self) -> PoisonedDataset:
        """A poisoned set of images that no scanner learned from."""
        return poisoned(self._cut[1], self.plan())

    @cached_property
    def innocents(self) -> PoisonedDataset:
        """The same images with nothing done to them."""
        return poisoned(self._cut[1], self.plan(rate=0.0))

    def plan(self, rate: float | None = None) -> PoisonPlan:
        """Return what the attacker does.

        Args:
            rate: Replaces the poisoned share.
        """
        assert self.suspect is not None
        return PoisonPlan(
            triggers=tuple(self.compositions.triggers[1:]),
            rate=self.suspect.rate if rate is None else rate,
            mode=self.suspect.mode,
            target=self.suspect.target,
            size=self.compositions.native_size,
            seed=self.seed,
        )

    @cached_property
    def _cut(self) -> tuple[ImageDataset, ImageDataset]:
        return cut(self._split("train"), self.compositions.share, self.seed)

    def _split(self, split: Any) -> ImageDataset:
        return load_dataset(self.name, split, **self.options.image_arguments())

    def _composed(self, images: ImageDataset, copies: int) -> CompositionDataset:
        options = self.compositions
        return composition_dataset(
            images,
            options.triggers,
            size=size_of(options.native_size),
            unseen=options.unseen,
            seed=self.seed,
            copies=copies,
        )


class RowCache(FeatureCache):
    """Rows of the image tower, each data set encoded as a whole, in one way.

    The last bits of a row depend on how many images were encoded together. A set that shared rows with another would
    depend on which of the two was encoded first, and a cell must not depend on which cells ran before it.

    Args:
        root: Folder of the rows; None keeps them in memory.
    """

    def __init__(self, root: Path | None = None) -> None:
        super().__init__(root)
        self._caches: dict[tuple[str, str], FeatureCache] = {}

    def features(
        self, dataset: ImageDataset, encode: Any, preprocess: Preprocess, **options: Any
    ) -> torch.Tensor:
        """See :meth:`FeatureCache.features`; ``batch_size`` is always the same."""
        key = (dataset.name, dataset.split)
        if key not in self._caches:
            digest = hashlib.sha256("\x1f".join(key).encode()).hexdigest()[:16]
            self._caches[key] = FeatureCache(None if self.root is None else self.root / digest)
        cache = self._caches[key]
        return cache.features(dataset, encode, preprocess, **{**options, "batch_size": _BATCH})


def cut(data: ImageDataset, share: float, seed: int) -> tuple[ImageDataset, ImageDataset]:
    """Cut a data set in two, class by class: what scanners learn from, and the rest.

    Args:
        data: The images.
        share: Share of each class that scanners learn from, at least one image.
        seed: Of the draw.
    """
    labels = np.array(data.labels)
    first: list[int] = []

    for label in range(len(data.classnames)):
        members = np.flatnonzero(labels == label)
        # The label "detection" is part of the seed, so that cuts stay what they are.
        order = numpy_rng(seed, "detection", data.name, label).permutation(members)
        first += order[: max(1, round(share * len(members)))].tolist()

    rest = sorted(set(range(len(data))) - set(first))
    return data.subset(sorted(first)), data.subset(rest)
