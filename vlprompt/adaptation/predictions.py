"""What an adapter says of images, and what it took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

__all__ = ["Predictions"]


@dataclass(frozen=True)
class Predictions:
    """Predictions for B images, in the order given; all tensors are on the CPU.

    Attributes:
        classnames: C names.
        probs: (B, C) probabilities after adaptation; their highest is the prediction.
        before: (B, C) probabilities of the same classifier before adaptation.
        kept: (B, V) which views the adaptation listened to; view 0 is the image itself.
        seconds: (B, 3) wall time per image of generating views by diffusion, making and encoding all views,
            and adapting.
    """

    classnames: tuple[str, ...]
    probs: Tensor
    before: Tensor
    kept: Tensor
    seconds: Tensor

    def __len__(self) -> int:
        return len(self.probs)

    @property
    def classes(self) -> Tensor:
        """(B,) class number of each prediction."""
        return self.probs.argmax(-1)

    @property
    def labels(self) -> list[str]:
        """Class name of each prediction."""
        return [self.classnames[c] for c in self.classes.tolist()]

    @property
    def confidence(self) -> Tensor:
        """(B,) probability of the predicted class."""
        return self.probs.amax(-1)

    @property
    def entropy(self) -> Tensor:
        """(B,) entropy of the probabilities, in nats."""
        return torch.special.entr(self.probs).sum(-1)

    @property
    def views_kept(self) -> Tensor:
        """(B,) number of views the adaptation listened to."""
        return self.kept.sum(-1)

    def __str__(self) -> str:
        rows = zip(self.labels, self.confidence.tolist(), strict=True)
        return "\n".join(f"{label} {100 * confidence:.1f} %" for label, confidence in rows)

    @classmethod
    def cat(cls, parts: Sequence[Predictions]) -> Predictions:
        """Return the predictions of several runs of images as one."""
        tensors = {f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(cls)[1:]}
        return cls(parts[0].classnames, **tensors)
