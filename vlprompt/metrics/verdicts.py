"""What a backdoor scanner says of images: how suspicious, which trigger, which object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Verdicts"]


@dataclass(frozen=True)
class Verdicts:
    """A scanner's verdicts on n images, on the CPU.

    T is the number of triggers, the first of which is "clean", and C the number of objects.

    Attributes:
        score: (n,), how suspicious an image is: larger is worse. This is what a threshold is compared with.
        trigger: (n, T) probability of each trigger; None if the scanner names none.
        object: (n, C) probability of each object; None if the scanner names none.
        composition: (n, T, C) score of each composition of a trigger and an object; None if the scanner has none.
    """

    score: Tensor
    trigger: Tensor | None = None
    object: Tensor | None = None
    composition: Tensor | None = None

    @classmethod
    def cat(cls, parts: Sequence[Verdicts]) -> Verdicts:
        """Return the verdicts of one scanner on several batches, in order.

        Args:
            parts: At least one.
        """
        return cls(
            torch.cat([part.score for part in parts]),
            _joined([part.trigger for part in parts]),
            _joined([part.object for part in parts]),
            _joined([part.composition for part in parts]),
        )


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Return the concatenated tensors; None if the scanner gave none."""
    tensors = [part for part in parts if part is not None]
    return torch.cat(tensors) if tensors else None
