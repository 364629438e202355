"""What a detector says of images: which trigger, which object, how suspicious."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

__all__ = ["Detecting", "Judgement"]


@dataclass(frozen=True)
class Judgement:
    """A detector's opinion of n images, on the CPU.

    Attributes:
        score: (n,), how suspicious: larger is worse; what a threshold is compared with.
        trigger: (n, T) probability of each trigger, the first clean; None if the detector names none.
        object: (n, C) probability of each object; None if the detector names none.
        pairs: (n, T, C) scores of pairs of both; None if the detector has none.
    """

    score: Tensor
    trigger: Tensor | None = None
    object: Tensor | None = None
    pairs: Tensor | None = None

    @classmethod
    def cat(cls, parts: list[Judgement]) -> Judgement:
        """Put opinions of one detector one behind the other."""

        def join(name: str) -> Tensor | None:
            held = [getattr(p, name) for p in parts]
            return None if held[0] is None else torch.cat(held)

        score = join("score")
        assert score is not None
        return cls(score, join("trigger"), join("object"), join("pairs"))


@runtime_checkable
class Detecting(Protocol):
    """What can judge images."""

    @property
    def threshold(self) -> float:
        """Score from which an image is called poisoned."""

    def judge(self, embeddings: Tensor) -> Judgement:
        """Return an opinion of (n, d) rows of the detector's own ``embed_images``."""
