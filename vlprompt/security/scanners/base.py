"""What every scanner of poisoned images is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlprompt.backbones import Backbone
from vlprompt.backbones.shallow import READS, embed_with_statistics
from vlprompt.classification.evaluate import image_embeddings
from vlprompt.core.names import check_classnames
from vlprompt.data import FeatureCache, ImageDataset
from vlprompt.learners._calibration import threshold_at
from vlprompt.learners._judgement import Judgement
from vlprompt.security.compositions import CompositionDataset, check_triggers

__all__ = ["Scanner"]


class Scanner:
    """Judges images by rows that the frozen image tower gives.

    Args:
        backbone: Frozen towers.
        classnames: The objects.
        triggers: Names, the first for none.

    Attributes:
        method: Its registry name.
        whole: Whether it judges a whole labelled set at once and not single images.
        reads: What its rows hold beside the image embedding, see :class:`vlprompt.learners.Learner`.
        static_images: Always; its rows may be cached.
        false_alarms: Share of clean validation images that the threshold lets be suspected.
    """

    method: str = ""
    whole: bool = False
    reads: str = ""
    static_images: bool = True
    false_alarms: float = 0.05

    def __init__(self, backbone: Backbone, classnames: Sequence[str], triggers: Sequence[str]) -> None:
        self.backbone = backbone
        self.classnames = check_classnames(classnames, "the scanner")
        self.triggers = check_triggers(triggers)
        self._threshold = 0.5

    @property
    def threshold(self) -> float:
        """Score from which an image is called poisoned."""
        return self._threshold

    def embed_images(self, images: Tensor) -> Tensor:
        """Return (B, d) rows of preprocessed images."""
        return self.backbone.image_embeddings(images)

    def rows(self, data: ImageDataset, cache: FeatureCache | None = None) -> Tensor:
        """Return (n, d) rows of a data set; scanners on one backbone share what the cache holds."""
        found = image_embeddings(_Everything(self.backbone), data, cache=cache)
        return found if self.reads else found[:, : self.backbone.dim]

    def fit(
        self,
        train: CompositionDataset,
        val: CompositionDataset,
        cache: FeatureCache | None = None,
        seed: int = 1,
    ) -> None:
        """Learn from images whose trigger is known; sets the threshold by validation's clean images."""
        self.learn(train, val, cache, seed)
        if not self.whole:
            rows = self.rows(val, cache)
            clean = torch.tensor(val.trigger_labels) == 0
            self._threshold = threshold_at(self.judge(rows[clean]).score, self.false_alarms)

    def learn(
        self, train: CompositionDataset, val: CompositionDataset, cache: FeatureCache | None, seed: int
    ) -> None:
        """Learn; nothing by default."""

    def judge(self, embeddings: Tensor) -> Judgement:
        """Return an opinion of (n, d) rows, each by itself."""
        raise NotImplementedError

    def judge_set(self, embeddings: Tensor, given: Tensor) -> Judgement:
        """Return an opinion of a whole set of (n, d) rows with the (n,) labels it came with."""
        return self.judge(embeddings)


class _Everything:
    """Encodes all that any scanner reads: embeddings, then statistics of the pixels and the first convolution."""

    static_images, reads = True, READS

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone

    def embed_images(self, images: Tensor) -> Tensor:
        return embed_with_statistics(self.backbone, images)
