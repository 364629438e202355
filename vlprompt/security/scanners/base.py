"""What every scanner of poisoned images is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlprompt.backbones import Backbone
from vlprompt.backbones.shallow import READS, embed_with_statistics
from vlprompt.core.names import check_classnames
from vlprompt.data import FeatureCache, ImageDataset
from vlprompt.data.compositions import CompositionDataset, check_triggers
from vlprompt.learners._calibration import threshold_at
from vlprompt.learners._scanning import ImageScanner, digest_of, native_size_of

__all__ = ["Scanner"]


class Scanner(ImageScanner):
    """A scanner that can be compared with others: built from the same arguments, fitted on the same data.

    Args:
        backbone: Frozen towers.
        classnames: The C objects.
        triggers: T names, the first ``"clean"``.

    Attributes:
        names_objects: Whether its verdicts name the object of each image.
        reads: What its rows hold beside the image embedding, see :class:`vlprompt.learners.Learner`.
        false_alarms: Share of clean validation images that the threshold lets be suspected.
        history: One record per epoch of what is trained step by step; empty for everything else.
    """

    method: str = ""
    names_objects: bool = False
    reads: str = ""
    false_alarms: float = 0.05

    def __init__(self, backbone: Backbone, classnames: Sequence[str], triggers: Sequence[str]) -> None:
        self.backbone = backbone
        self.classnames = check_classnames(classnames, "the scanner")
        self.triggers = check_triggers(triggers)
        self.history: list[dict[str, Any]] = []
        self._threshold = 0.5
        self._native_size: int | None = None

    @classmethod
    def option_problems(cls, options: Mapping[str, Any]) -> list[str]:
        """Return what is wrong inside options that are sections themselves, a sentence each, beginning with the key.

        Args:
            options: Names and types of the options have been checked already.
        """
        return []

    @property
    def threshold(self) -> float:
        """See :meth:`ImageScanner.threshold`."""
        return self._threshold

    @property
    def native_size(self) -> int | None:
        """See :meth:`ImageScanner.native_size`; of the data that it was fitted on."""
        return self._native_size

    @property
    def digest(self) -> str:
        """See :meth:`ImageScanner.digest`."""
        return digest_of({**self.learned(), "threshold": torch.tensor(self.threshold, dtype=torch.float64)})

    def learned(self) -> dict[str, Tensor]:
        """Return what :meth:`learn` leaves behind, by name; nothing by default."""
        return {}

    def embed_images(self, images: Tensor) -> Tensor:
        """See :meth:`ImageScanner.embed_images`."""
        return self.backbone.image_embeddings(images)

    def rows(self, data: ImageDataset, cache: FeatureCache | None = None) -> Tensor:
        """Return the rows (n, D) of a data set; all scanners on one backbone share what the cache holds."""
        cache = FeatureCache() if cache is None else cache

        # What any scanner reads is encoded at once: embeddings, then statistics of pixels and first convolution.
        rows = cache.features(
            data,
            lambda images: embed_with_statistics(self.backbone, images),
            self.backbone.preprocess,
            fingerprint=f"{self.backbone.features_id}{READS}",
        )
        return rows if self.reads else rows[:, : self.backbone.dim]

    def fit(
        self,
        train: CompositionDataset,
        val: CompositionDataset,
        cache: FeatureCache | None = None,
        seed: int = 1,
        folder: Path | None = None,
    ) -> None:
        """Learn from images whose trigger is known, and set the threshold by the clean images of validation.

        Args:
            train: Images to learn from.
            val: Images to choose the threshold by.
            cache: Where rows of the image tower are kept.
            seed: Of everything drawn.
            folder: Where a scanner that is trained step by step keeps its checkpoint, and continues from one.
        """
        self._native_size = native_size_of({train.native_size, val.native_size})
        self.learn(train, val, cache, seed, folder)
        if not self.needs_whole_set:
            rows = self.rows(val, cache)
            clean = torch.tensor(val.trigger_labels) == 0
            self._threshold = threshold_at(self.judge(rows[clean]).score, self.false_alarms)

    def learn(
        self,
        train: CompositionDataset,
        val: CompositionDataset,
        cache: FeatureCache | None,
        seed: int,
        folder: Path | None,
    ) -> None:
        """Learn from images whose trigger is known; nothing by default. Arguments are those of :meth:`fit`."""
