"""CLIP-Adapter: a small network on top of the image embedding, mixed with the embedding itself.

Paper: Gao et al., "CLIP-Adapter: Better Vision-Language Models with Feature Adapters", IJCV 2024, arXiv
    2110.04544, section 3.2; the visual adapter alone, as in the published code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from vlprompt.backbones import Backbone
from vlprompt.core.seeding import seeded_modules
from vlprompt.learners import LEARNERS
from vlprompt.learners.base import DEFAULT_TEMPLATES, Learner
from vlprompt.learners.recipe import Recipe

__all__ = ["ClipAdapter", "embedding_adapter"]


def embedding_adapter(width: int, reduction: int, seed: int, title: str) -> nn.Sequential:
    """Return linear, ReLU, linear, ReLU without biases: d -> d / reduction -> d.

    Args:
        width: d, the joint dimension.
        reduction: How many times narrower the hidden layer is.
        seed: Of the random start.
        title: What the start is drawn for; each has its own.
    """
    hidden = max(1, width // reduction)
    with seeded_modules(seed, title):
        return nn.Sequential(
            nn.Linear(width, hidden, bias=False),
            nn.ReLU(),
            nn.Linear(hidden, width, bias=False),
            nn.ReLU(),
        )


@LEARNERS.register(
    "clip_adapter", summary="a two-layer network mixed into the image embedding", paper="2110.04544"
)
class ClipAdapter(Learner):
    """Image features are r A(x) + (1 - r) x, where x is the embedding before normalisation.

    A is linear, ReLU, linear, ReLU without biases: d -> d / reduction -> d. Neither tower learns, so the text
    tower runs once and the image tower once per view.

    Args:
        backbone: See :class:`Learner`.
        classnames: See :class:`Learner`.
        templates: Sentences whose features make the class weights (one in the paper).
        ratio: r, the share of A(x).
        reduction: How many times narrower A's hidden layer is than the joint space.
        seed: Of the random start.
    """

    recipe = Recipe({"lr": 1e-5, "batch_size": 32, "epochs": 200, "optimizer": "adamw", "weight_decay": 0.0})

    def __init__(
        self,
        backbone: Backbone,
        classnames: Sequence[str],
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        *,
        ratio: Annotated[float, Field(ge=0, le=1)] = 0.2,
        reduction: Annotated[int, Field(ge=1)] = 4,
        seed: int = 1,
    ) -> None:
        super().__init__(backbone, classnames, templates)
        self.ratio = ratio

        self.adapter = embedding_adapter(backbone.dim, reduction, seed, "clip adapter")

        weights = backbone.class_weights(self.classnames, self.templates)
        self.register_buffer("zero_shot", weights, persistent=False)

    def class_embeddings(self) -> Tensor:
        """See :meth:`Learner.class_embeddings`; constant."""
        return self.get_buffer("zero_shot")

    def class_weights(self) -> Tensor:
        """See :meth:`Learner.class_weights`; the embeddings, which have unit length."""
        return self.get_buffer("zero_shot")

    def logits(self, embeddings: Tensor) -> Tensor:
        """Return (B, C) logits of (B, d) image embeddings."""
        return super().logits(self.ratio * self.adapter(embeddings) + (1 - self.ratio) * embeddings)
