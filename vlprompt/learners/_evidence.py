"""What the trigger's side of a scanner reads: the view that counts, and images of other kinds beside the user's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vlprompt.backbones import Backbone, shallow
from vlprompt.backbones.text import TextTower
from vlprompt.core.seeding import numpy_rng
from vlprompt.data import forensics
from vlprompt.data.backgrounds import background_images
from vlprompt.data.triggers import create_trigger
from vlprompt.learners._scanning import ImageScanner

__all__ = ["Background", "evidence_read", "most_suspicious", "paired_cosines"]

_TRIGGERED = 2  # copies of an image, each with another trigger
_BATCH = 64


@dataclass(frozen=True)
class Background:
    """Rows of clean and triggered backgrounds; a fifth is kept from learning, for the threshold.

    Attributes:
        rows: (n, D), as the scanner embeds images.
        triggers: (n,), numbers of their triggers, 0 for none.
    """

    rows: Tensor
    triggers: Tensor

    @classmethod
    def of(cls, scanner: ImageScanner, count: int, seed: int) -> Background:
        """Draw, trigger and embed backgrounds.

        Args:
            scanner: Whose triggers, native size, preparation and rows they have.
            count: Clean images; each also comes with two triggers.
            seed: Of the triggers, and of which image gets which.
        """
        rng = numpy_rng(seed, "triggers of backgrounds")
        drawn = [create_trigger(name, size=scanner.native_size, seed=seed) for name in scanner.triggers[1:]]
        images: list[Image.Image] = []
        labels: list[int] = []
        for image in background_images(count):
            images.append(image)
            labels.append(0)
            for number in rng.permutation(len(drawn))[:_TRIGGERED]:
                images.append(drawn[number](image))
                labels.append(int(number) + 1)

        rows = []
        for start in range(0, len(images), _BATCH):
            batch = torch.stack([scanner.preprocess(image) for image in images[start : start + _BATCH]])
            with torch.no_grad():
                rows.append(scanner.embed_images(batch.to(scanner.backbone.device)).cpu())
        return cls(torch.cat(rows), torch.tensor(labels))

    @property
    def kept(self) -> int:
        """How many rows are kept from learning; they are the first."""
        return len(self.triggers) // 5

    @property
    def clean(self) -> Tensor:
        """The rows of clean images that are kept."""
        return self.rows[: self.kept][self.triggers[: self.kept] == 0]

    def sample(self, count: int) -> tuple[Tensor, Tensor]:
        """Return some rows to learn from and their triggers, drawn by torch's own generator as dropout is."""
        chosen = torch.randint(self.kept, len(self.triggers), (count,))
        return self.rows[chosen], self.triggers[chosen]


def evidence_read(backbone: Backbone, evidence: str) -> tuple[int, str]:
    """Return E, the width of what the trigger's side reads, and what cached rows with it are filed under.

    Args:
        backbone: Of the scanner.
        evidence: ``"shallow"``, ``"native"`` or ``"embedding"``.
    """
    if evidence == "native":
        return forensics.statistics_width(), forensics.FORENSICS
    if evidence == "shallow":
        return shallow.statistics_width(backbone), shallow.READS
    return backbone.dim, ""


def most_suspicious(evidence: Tensor, present: Tensor, logits: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return the (B, E) evidence of the view of each image that is least clean.

    Args:
        evidence: (B, V, E), of every view.
        present: (B, V), whether there is such a view; there always is the first.
        logits: From (n,) numbers of images and (n, E) evidence of one of their views to (n, T) logits of triggers.
    """
    if evidence.shape[1] == 1 or not bool(present[:, 1:].any()):
        return evidence[:, 0]

    with torch.no_grad():
        image = present.nonzero()[:, 0]
        suspicion = torch.full(present.shape, -1.0, device=evidence.device)
        suspicion[present] = 1 - logits(image, evidence[present]).float().softmax(-1)[:, 0]
    return evidence[torch.arange(len(evidence), device=evidence.device), suspicion.argmax(1)]


def paired_cosines(text: TextTower, layout: Any, words: Tensor, features: Tensor) -> Tensor:
    """Return (B, K) cosines of (B, d) features with K sentences whose words differ by image.

    Args:
        text: Encodes sentences.
        layout: Of the K sentences.
        words: (B, M, Dt), each image's learned words.
        features: (B, d).
    """
    texts = F.normalize(text.encode(layout, words), dim=-1)
    return (texts @ features[..., None])[..., 0]
