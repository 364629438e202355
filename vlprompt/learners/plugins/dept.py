"""DePT: a second head learns what belongs to the trained classes, so that the shared space need not.

Paper: Zhang et al., "DePT: Decoupled Prompt Tuning", CVPR 2024, arXiv 2309.07439, section 3.2. The authors' code knows
by the name of a data set whether classes are those of the training; here the head knows its classes by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vlprompt.core.seeding import seeded_modules
from vlprompt.learners.base import Learner
from vlprompt.learners.plugins import PLUGINS
from vlprompt.learners.plugins._texts import require_texts
from vlprompt.learners.plugins.base import Plugin, with_embeddings

__all__ = ["DePT"]

_LOSS = "dept_cross_entropy"


class ChannelScale(nn.Module):
    """a * x + b for every channel; it starts as the identity.

    Args:
        width: d.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Return (n, d) scaled vectors of (n, d)."""
        return self.scale * x + self.bias


@PLUGINS.register(
    "dept", summary="a second, linear head for the trained classes, on scaled channels", paper="2309.07439"
)
class DePT(Plugin):
    """Adds (1 - w) to the cross entropy inside, and w times that of a linear head.

    The head reads raw, not unit-length, embeddings, whose channels are scaled and shifted: of images by one pair of
    vectors, of classes by another. In training it sees the images of a batch and the class embeddings of their labels:
    2 B rows. Classes that were all trained on are scored by (1 - w) * similarity + w * head (two different scales, as
    published); where one was not, by the similarity. Other losses inside stay as they are.

    Args:
        inner: A learner whose text tower gives one vector per class.
        weight: w of the head; 0 is the learner inside.
        rate: Multiple of the learning rate that the head and the scales learn with.
        head_classes: Classes of the head; None: all. A learner that was brought to other classes has it.
        seed: Of the head's start.

    Raises:
        DataError: If it can't stand on that learner; says why.
    """

    plugin = "dept"
    rank = 2
    head_bound = True

    def __init__(
        self,
        inner: Learner,
        *,
        weight: Annotated[float, Field(ge=0, le=1)] = 0.7,
        rate: Annotated[float, Field(gt=0)] = 6.5,
        head_classes: tuple[str, ...] | None = None,
        seed: int = 1,
    ) -> None:
        super().__init__(inner)
        require_texts(self)
        self.keep_head(head_classes)
        self.weight = weight
        self.rate = rate
        if inner.recipe.train.get("optimizer", "sgd") == "sgd":
            train = {**inner.recipe.train, "lr": 0.0035, "batch_size": 4, "epochs": 10}
            self.recipe = replace(inner.recipe, train=train, epochs_by_shots=())

        width = self.backbone.dim
        self.image_scale = ChannelScale(width)
        self.text_scale = ChannelScale(width)
        with seeded_modules(seed, "dept"):
            self.head = nn.Linear(width, len(self.head_classes))

        places = (
            self.head_places
        )  # a list of Python's own: it belongs to the class list, not to what is learned
        self._places = [place for place in places if place is not None]
        self._texts: Tensor | None = None
        self.refiners.append(self._listen)

    @property
    def knows_all(self) -> bool:
        """Whether every class was trained on, so that the head is used."""
        return bool(self._places)

    def logits(self, embeddings: Tensor) -> Tensor:
        """Return (B, C) logits; see the class."""
        similarity = self.inner.logits(embeddings)
        if not self.knows_all:
            return similarity
        return (1 - self.weight) * similarity + self.weight * self._head(self.image_scale, embeddings)

    def loss(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the losses inside, of which cross entropies count 1 - w, and the head's."""
        if not self.knows_all:
            return self.inner.loss(batch)

        batch = with_embeddings(self.inner, batch)
        losses = self.inner.loss(batch)
        texts = self.inner.class_embeddings() if self._texts is None else self._texts
        self._texts = None

        labels = batch["label"]
        rows = torch.cat(
            [self._head(self.text_scale, texts[labels]), self._head(self.image_scale, batch["embedding"])]
        )
        shares = {
            name: (1 - self.weight) * value if name.endswith("cross_entropy") else value
            for name, value in losses.items()
        }
        return {**shares, _LOSS: self.weight * F.cross_entropy(rows, torch.cat([labels, labels]))}

    def new_losses(self) -> frozenset[str]:
        """See :meth:`Plugin.new_losses`."""
        return frozenset({_LOSS})

    def _head(self, scale: ChannelScale, embeddings: Tensor) -> Tensor:
        """Return the head's (n, C) logits of (n, d) raw embeddings; what a learner has beside them is left out."""
        logits = self.head(scale(embeddings[:, : self.backbone.dim]))
        return logits[:, self._places]

    def _listen(self, embeddings: Tensor) -> Tensor:
        """Keep the class embeddings that the loss inside computes: one text pass serves both heads."""
        if self.training and torch.is_grad_enabled():
            self._texts = embeddings
        return embeddings
