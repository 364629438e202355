"""TransCLIP: all images are named together, by Gaussian classes and a graph of neighbours.

Paper: Zanella et al., "Boosting Vision-Language Models with Transduction", NeurIPS 2024, arXiv 2406.01837, section 4.

It takes for granted that every class is there: where most classes are missing it collapses, and StatA does not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vlprompt.adaptation import ADAPTERS
from vlprompt.adaptation._features import Share, Views
from vlprompt.adaptation._gaussian import GaussianAdapter, Gaussians, class_means, weighted_squares
from vlprompt.adaptation.base import Adapted, EncodedViews
from vlprompt.adaptation.views import Augment, ViewPlan
from vlprompt.learners import Learner

__all__ = ["TransductiveClip"]

log = logging.getLogger("vlprompt.adaptation")


@ADAPTERS.register(
    "transclip",
    summary="all images together: Gaussian classes and a graph of neighbours; no gradients",
    paper="2406.01837",
)
class TransductiveClip(GaussianAdapter):
    """Alternate assignments z and Gaussians with one diagonal covariance for all classes.

    z_i is proportional to y_i^trust exp((g_i + 50 smooth / 6 (W z + W^T z)_i) / 50), with the classifier's
    probabilities y and Gaussian log-likelihoods g; means are those of z, unit length.

    Args:
        learner: See :class:`FeatureAdapter`.
        batch: Images that are named together; None for all of them. A batch that is much smaller than the number of
            classes makes the method collapse; a warning says so.
        rounds: How often the Gaussians are fitted.
        trust: Weight of the classifier's opinion (the paper's lambda).
        smooth: Weight of the graph; 0 leaves a mixture of Gaussians.
        views: V, including the image itself.
        augment: See :class:`ViewPlan`.
        seed: Of the views.
        share: Share of the views that represent an image, the most confident ones.
    """

    def __init__(
        self,
        learner: Learner,
        *,
        batch: Annotated[int, Field(ge=1)] | None = None,
        rounds: Annotated[int, Field(ge=1)] = 10,
        trust: Annotated[float, Field(ge=0)] = 1.0,
        smooth: Annotated[float, Field(ge=0)] = 1.0,
        views: Views = 1,
        augment: Augment = "crop_flip",
        seed: int = 0,
        share: Share = 0.1,
    ) -> None:
        plan = ViewPlan(views, augment, seed)
        super().__init__(learner, plan, share, batch=batch, rounds=rounds, trust=trust, smooth=smooth)

    def adapt(self, views: EncodedViews) -> Adapted:
        """See :meth:`Adapter.adapt`."""
        count = len(views.embeddings)
        if count < 2 * len(self.weights):
            log.warning(
                "transclip: %d images for %d classes; where classes are missing it does worse than no adaptation, "
                "use stata.",
                count,
                len(self.weights),
            )
        return super().adapt(views)

    def classes_of(self, features: Tensor, logits: Tensor) -> tuple[Gaussians, Callable[[Tensor], Gaussians]]:
        """See :meth:`GaussianAdapter.classes_of`."""
        width = features.shape[1]
        start = Gaussians(self.weights.to(features), torch.full_like(features[:1], 1 / width), False)

        def fit(z: Tensor) -> Gaussians:
            means = class_means(features, z)
            variances = weighted_squares(features, z, means).sum(0, keepdim=True) / len(features)
            return Gaussians(means, variances, False)

        return start, fit
