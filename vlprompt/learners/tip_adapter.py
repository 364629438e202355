"""Tip-Adapter: zero-shot logits plus a vote of the training images, weighted by how much an image resembles them.

Paper: Zhang et al., "Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification", ECCV 2022,
    arXiv 2207.09519, section 3 (Tip-Adapter-F: section 3.2).

Where this differs from the published code: that code keeps the fine-tuned keys and the alpha and beta that are
best on the *test* set. Here everything is chosen on validation data; without any, nothing is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from vlprompt.backbones import Backbone
from vlprompt.learners import LEARNERS
from vlprompt.learners._cache import SampleCache, search_grid
from vlprompt.learners.base import DEFAULT_TEMPLATES
from vlprompt.learners.hooks import ValidationSamples
from vlprompt.learners.recipe import Recipe

__all__ = ["TipAdapter", "TipAdapterF"]


@LEARNERS.register(
    "tip_adapter", summary="training images vote by similarity; no training", paper="2207.09519"
)
class TipAdapter(SampleCache):
    """Logits tau <f, w> + alpha sum_n exp(-beta (1 - <f, k_n>)) v_n over a cache of N training samples.

    Keys k_n are the unit-length means of a sample's embeddings over its augmented views, values v_n one-hot
    labels. An empty cache has no vote: before :meth:`prepare` this is zero-shot classification.

    Args:
        backbone: See :class:`Learner`.
        classnames: See :class:`Learner`.
        templates: Averaged into the zero-shot weights w.
        alpha: Weight of the vote where validation data do not choose it (the code's value for ImageNet).
        beta: Sharpness of similarity, likewise.
        alpha_max: Upper end of the search, which starts at 0.1.
        beta_max: Upper end of the search, which starts at 0.1.
        alpha_steps: Values of alpha tried for each beta; 0 keeps ``alpha`` and ``beta``.
        beta_steps: Values of beta tried; 0 keeps ``alpha`` and ``beta``.
    """

    recipe = Recipe(factors=(1.0,))

    alpha: Tensor
    beta: Tensor

    def __init__(
        self,
        backbone: Backbone,
        classnames: Sequence[str],
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        *,
        alpha: Annotated[float, Field(gt=0)] = 1.17,
        beta: Annotated[float, Field(gt=0)] = 1.0,
        alpha_max: Annotated[float, Field(gt=0.1)] = 3.0,
        beta_max: Annotated[float, Field(gt=0.1)] = 7.0,
        alpha_steps: Annotated[int, Field(ge=0)] = 20,
        beta_steps: Annotated[int, Field(ge=0)] = 200,
    ) -> None:
        super().__init__(backbone, classnames, templates)
        self.start = (alpha, beta)
        self.alphas = search_grid(alpha_max, alpha_steps)
        self.betas = search_grid(beta_max, beta_steps)

        self.register_buffer("alpha", torch.tensor(alpha))
        self.register_buffer("beta", torch.tensor(beta))

    def logits(self, embeddings: Tensor) -> Tensor:
        """Return (B, C) logits of (B, d) image embeddings."""
        features = F.normalize(embeddings, dim=-1)
        affinities = (-self.beta * (1 - features @ self.keys.T)).exp()
        return super().logits(embeddings) + self.alpha * self.votes(affinities)

    def prepare(self, views: Tensor, labels: Tensor) -> None:
        """See :meth:`SampleCache.prepare`; called by ``fit`` before anything is trained."""
        super().prepare(views, labels)
        self.alpha.fill_(self.start[0])
        self.beta.fill_(self.start[1])

    @property
    def chooses(self) -> tuple[str, ...]:
        """See :attr:`LearnerHooks.chooses`."""
        return ("alpha", "beta") if self.alphas and self.betas else ()

    def calibrate(self, sources: Sequence[ValidationSamples]) -> dict[str, float]:
        """See :meth:`SampleCache.choose_alpha_and_beta`."""
        ones = torch.ones_like(self.keys[:, :1])
        return self.choose_alpha_and_beta(
            sources, super().logits, lambda features: features @ self.keys.T, ones
        )

    def cache_tensors(self) -> dict[str, Tensor]:
        """Return the cache (``keys`` (N, d), ``values`` (N,)) and ``alpha`` and ``beta``."""
        return {**super().cache_tensors(), "alpha": self.alpha, "beta": self.beta}

    def cache_shapes(self, count: int) -> dict[str, tuple[int, ...]]:
        """See :meth:`SampleCache.cache_shapes`."""
        return {**super().cache_shapes(count), "alpha": (), "beta": ()}


@LEARNERS.register("tip_adapter_f", summary="Tip-Adapter whose keys are fine-tuned", paper="2207.09519")
class TipAdapterF(TipAdapter):
    """Tip-Adapter-F: the cache's keys are trained, from the values that Tip-Adapter has; options as there.

    Training keeps the given alpha and beta; validation chooses the epoch (``select: best``), then alpha and
    beta. Published recipe: AdamW, lr 0.001, eps 1e-4, cosine per step, 20 epochs, batch 256, 10 views.
    """

    recipe = Recipe(
        {
            "lr": 0.001,
            "batch_size": 256,
            "epochs": 20,
            "optimizer": "adamw",
            "eps": 1e-4,
            "weight_decay": 0.01,
            "schedule": "cosine",
            "warmup_epochs": 0.0,
            "drop_last": False,
        },
        factors=(0.1, 1.0, 10.0),
    )

    fine_tuned = True
