"""Kept prefixes: what the image tower makes of a fixed view below the first place where something learned enters.

It never changes, so it is computed once and kept, in memory or in the cache folder; later epochs, evaluations and runs
go on from there, without decoding the image again. Exact: a batch goes on with the numbers that it would have computed.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlprompt.backbones.vision import TokenStates
from vlprompt.data import Augmentation, FeatureCache, ImageDataset
from vlprompt.data._shards import StoredRows
from vlprompt.learners import Learner

__all__ = ["KeptStates", "kept_states", "pass_size"]

log = logging.getLogger("vlprompt.classification")


@dataclass(frozen=True)
class KeptStates:
    """The token states of every image of a data set, read when they are asked for.

    Attributes:
        rows: Flat states.
        example: Those of one image, whose shape and kind they have.
    """

    rows: StoredRows
    example: TokenStates

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Tensor) -> TokenStates:
        return replace(self.example, tokens=self.rows[index].unflatten(1, self.example.tokens.shape[1:]))


def kept_states(
    learner: Learner,
    data: ImageDataset,
    cache: FeatureCache,
    *,
    size: int,
    augmentation: Augmentation | None = None,
    seed: int = 0,
    views: int = 1,
    full_passes: bool = True,
) -> list[KeptStates]:
    """Return the kept states of every fixed view; empty if the learner reads pixels or they don't fit into the budget.

    Args:
        learner: Says where it enters the image tower (:meth:`Learner.frozen_stages`).
        data: n images.
        cache: Where they are kept, and how much of it.
        size: Images per pass. The last bits of a tower's numbers depend on it, so it is the size of the batches that go
            on from the states, and part of the key.
        augmentation: What makes a view of an image; None: none.
        seed: Of the views.
        views: V, number of fixed views.
        full_passes: Fill a pass of fewer images up to ``size``.
    """
    stages = 0 if learner.static_images or not cache.prefix_bytes else learner.frozen_stages()
    if not stages:
        return []

    augmentation = augmentation or Augmentation()
    backbone = learner.backbone
    example = learner.frozen_states(torch.zeros(1, 3, *backbone.image_size))
    kind = "" if type(example) is TokenStates else f"{type(example).__name__} "
    row_bytes = example.tokens.numel() * example.tokens.element_size()

    def encode(images: Tensor) -> Tensor:
        count = len(images)
        if full_passes and count < size:
            images = torch.cat([images, images[-1:].expand(size - count, -1, -1, -1)])
        return learner.frozen_states(images).tokens[:count].flatten(1)

    kept = []
    for view in range(views):
        rows = cache.prefixes(
            data,
            encode,
            learner.preprocess,
            fingerprint=f"{backbone.features_id}{learner.preparation}/{kind}{stages - 1} blocks/{size}",
            row_bytes=row_bytes,
            augmentation=augmentation,
            seed=seed,
            view=view,
            dtype=example.tokens.dtype,
            batch_size=size,
        )
        if rows is None:
            _say_too_large(data, views, row_bytes, cache)
            return []
        kept.append(KeptStates(rows, example))

    return kept


def pass_size(batch_size: int, samples: int, parts: int) -> int:
    """Return the images that one part of a global batch holds.

    Args:
        batch_size: Samples of a global batch.
        samples: Of the data set; a batch holds at most as many.
        parts: Micro-batches of all processes.
    """
    return max(1, math.ceil(min(batch_size, samples) / parts))


def _say_too_large(data: ImageDataset, views: int, row_bytes: int, cache: FeatureCache) -> None:
    log.info(
        "%s: states of %d x %d views take %.2f GiB, more than data.prefix_gib=%.2f leaves; its images go through the "
        "whole tower every time.",
        data.name,
        len(data),
        views,
        len(data) * views * row_bytes / 2**30,
        cache.prefix_bytes / 2**30,
    )
