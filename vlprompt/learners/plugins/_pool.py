"""Training images of every class, from which a batch is completed with images of other classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vlprompt.backbones.vision import TokenStates
from vlprompt.learners.base import Learner
from vlprompt.learners.hooks import TrainingSamples

__all__ = ["ImagePool", "gather"]


@dataclass(frozen=True)
class ImagePool:
    """Images of one training set, as batches have them.

    Attributes:
        key: What they are: ``"embedding"``, cached embeddings, or ``"image"``.
        rows: One for each image and fixed view of a cached embedding; one for each image of the first epoch otherwise.
        members: Class number to its rows.
    """

    key: str
    rows: Any
    members: dict[int, list[int]]

    @staticmethod
    def of(learner: Learner, source: TrainingSamples) -> ImagePool:
        """Return the images that a learner is about to be trained on.

        A learner that leaves the image tower alone needs embeddings alone; for another one, the images of the first
        epoch are kept in memory.
        """
        if learner.static_images:
            views, labels = source.training_data()
            rows: Any = views.flatten(0, 1)
            labels = labels.repeat(len(views))
            key = "embedding"
        else:
            parts = list(source.first_epoch())
            rows = _joined([part["image"] for part in parts])
            labels = torch.cat([part["label"] for part in parts])
            key = "image"

        members: dict[int, list[int]] = {}
        for row, label in enumerate(source.positions[labels].tolist()):
            members.setdefault(label, []).append(row)
        return ImagePool(key, rows, members)

    def has(self, label: int) -> bool:
        """Return whether there is an image of a class."""
        return label in self.members

    def draw(self, labels: Sequence[int]) -> dict[str, Any]:
        """Return one image of each class, drawn by the generator of the training step."""
        chosen = []
        for label in labels:
            rows = self.members[label]
            chosen.append(rows[int(torch.randint(len(rows), (1,)))])
        return {self.key: self.rows[torch.tensor(chosen, dtype=torch.long)]}


def gather(batch: Mapping[str, Any], drawn: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a batch's images, or their embeddings, and drawn ones behind them."""
    if "image" in drawn:
        return {"image": _joined([batch["image"], drawn["image"].to(device)])}
    return {"embedding": torch.cat([batch["embedding"], drawn["embedding"].to(device)])}


def _joined(parts: Sequence[Any]) -> Any:
    """Return images of all parts, pixels or token states."""
    if isinstance(parts[0], TokenStates):
        return TokenStates.cat(parts)
    return torch.cat(list(parts))
