"""Predictions of an adapter, with the seconds that they took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

__all__ = ["Predictions"]

_SCORE = "score/"  # before the names of scores in files


@dataclass(frozen=True)
class Predictions:
    """Predictions for B images, in the order given; all tensors are on the CPU.

    Attributes:
        classnames: C names.
        probs: (B, C) probabilities after adaptation; their highest is the prediction.
        before: (B, C) probabilities of the same classifier before adaptation.
        kept: (B, V) mask of the views that the adaptation used; view 0 is the image itself.
        seconds: (B, 3) wall time per image, in seconds: generating views by diffusion, making and encoding all views,
            adapting.
        scores: (B,) scores of how known an image looks, by name (see :mod:`vlprompt.adaptation.scores`); ``before_``
            and a name is the one without adaptation.
    """

    TENSORS: ClassVar[tuple[str, ...]] = ("probs", "before", "kept", "seconds")

    classnames: tuple[str, ...]
    probs: Tensor
    before: Tensor
    kept: Tensor
    seconds: Tensor
    scores: Mapping[str, Tensor] = field(default_factory=dict)

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
        """(B,) number of views that the adaptation used."""
        return self.kept.sum(-1)

    def __str__(self) -> str:
        rows = zip(self.labels, self.confidence.tolist(), strict=True)
        return "\n".join(f"{label} {100 * confidence:.1f} %" for label, confidence in rows)

    @classmethod
    def cat(cls, parts: Sequence[Predictions]) -> Predictions:
        """Return the predictions of several runs of images as one."""
        rows = [part.tensors() for part in parts]
        return cls.of_tensors(
            parts[0].classnames, {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
        )

    def rows(self, rows: Tensor) -> Predictions:
        """Return some of the predictions.

        Args:
            rows: Numbers, or a mask.
        """
        return self.of_tensors(
            self.classnames, {name: tensor[rows] for name, tensor in self.tensors().items()}
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name, as they are written to files."""
        tensors = {"probs": self.probs, "before": self.before, "kept": self.kept, "seconds": self.seconds}
        return tensors | {f"{_SCORE}{name}": values for name, values in self.scores.items()}

    @classmethod
    def of_tensors(cls, classnames: tuple[str, ...], tensors: Mapping[str, Tensor]) -> Predictions:
        """Return the predictions that :meth:`tensors` gave."""
        parts = {name: tensors[name] for name in cls.TENSORS}
        scores = {
            name.removeprefix(_SCORE): values for name, values in tensors.items() if name.startswith(_SCORE)
        }
        return cls(classnames, **parts, scores=scores)
