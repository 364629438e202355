"""MTA: the mode of the views' features, by a mean shift that also learns a weight for each view.

Paper: Zanella and Ben Ayed, "On the Test-Time Zero-Shot Generalization of Vision-Language Models: Do We Really Need
    Prompt Learning?", CVPR 2024, arXiv 2405.02266, section 3.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from vlprompt.adaptation import ADAPTERS
from vlprompt.adaptation.base import Adapted, Adapter, EncodedViews
from vlprompt.adaptation.selection import keep_count
from vlprompt.adaptation.views import Augment, ViewPlan
from vlprompt.learners import Learner

__all__ = ["MeanShift", "robust_mode"]

_ITERATIONS = 5
_TOLERANCE = 1e-6
_LEAST_BANDWIDTH = 1e-8  # squared; identical views have none of their own


@ADAPTERS.register(
    "mta", summary="the mode of the views' features by robust mean shift; no gradients", paper="2405.02266"
)
class MeanShift(Adapter):
    """The classifier gets the mode of the views' features instead of the feature of the image.

    Args:
        learner: See :class:`Adapter`.
        views: V, including the image itself, where the search for the mode starts.
        augment: See :class:`ViewPlan`.
        seed: Of the views.
        neighbours: Share of the other views that sets a view's bandwidth: half their mean squared distance.
        affinity: Weight of agreement in prediction (the paper's lambda).
        sharpness: Temperature of the inlierness scores (the paper's lambda_y).
    """

    def __init__(
        self,
        learner: Learner,
        *,
        views: Annotated[int, Field(ge=1)] = 64,
        augment: Augment = "crop_flip",
        seed: int = 0,
        neighbours: Annotated[float, Field(gt=0, le=1)] = 0.3,
        affinity: Annotated[float, Field(ge=0)] = 4.0,
        sharpness: Annotated[float, Field(gt=0)] = 0.2,
    ) -> None:
        super().__init__(learner, ViewPlan(views, augment, seed))
        self.neighbours = neighbours
        self.affinity = affinity
        self.sharpness = sharpness

    @torch.no_grad()
    def adapt(self, views: EncodedViews) -> Adapted:
        """See :meth:`Adapter.adapt`."""
        features = F.normalize(views.embeddings, dim=-1)
        probs = self.view_logits(views.embeddings).softmax(-1)

        modes = []
        for rows, predictions in zip(features, probs, strict=True):
            modes.append(robust_mode(rows, predictions, self.neighbours, self.affinity, self.sharpness))
        logits = self.view_logits(torch.stack(modes)[:, None])[:, 0]
        kept = torch.ones(features.shape[:2], dtype=torch.bool)
        return Adapted(logits.softmax(-1), kept, logits / self.backbone.logit_scale)


def robust_mode(
    features: Tensor, probs: Tensor, neighbours: float = 0.3, affinity: float = 4.0, sharpness: float = 0.2
) -> Tensor:
    """Return the (d,) unit-length mode of the features of one image.

    Alternates the inlierness y = softmax((k(m) + affinity * A y) / sharpness), with A = P P^T and Gaussian
    densities k, and the mode m = sum_v y_v k_v f_v, normalised; up to 5 rounds of up to 5 iterations each.
    Zanella and Ben Ayed, CVPR 2024, section 3.

    Args:
        features: (V, d) unit-length features, the image itself first.
        probs: (V, C) predictions.
        neighbours: See :class:`MeanShift`.
        affinity: See :class:`MeanShift`.
        sharpness: See :class:`MeanShift`.
    """
    views = len(features)
    if views == 1:
        return features[0]

    # Distances without a matrix product: its rounding would give identical views a distance above 0.
    squared = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist").square()
    # Column 0 of the sorted distances is that of a view to itself.
    nearest = squared.sort(dim=1).values[:, 1 : 1 + keep_count(neighbours, views - 1)]
    bandwidth = (0.5 * nearest.mean(1)).clamp(min=_LEAST_BANDWIDTH)

    agreement = affinity * probs @ probs.T
    inlierness = features.new_full((views,), 1 / views)
    mode = features[0]

    # Inlierness and mode in turn, each until it hardly changes.
    for _ in range(_ITERATIONS):
        density = _density(features, mode, bandwidth)
        for _ in range(_ITERATIONS):
            before = inlierness
            inlierness = ((density + agreement @ inlierness) / sharpness).softmax(0)
            if float((before - inlierness).norm()) < _TOLERANCE:
                break

        for _ in range(_ITERATIONS):
            before = mode
            mode = F.normalize((_density(features, mode, bandwidth) * inlierness) @ features, dim=0)
            if float((before - mode).norm()) < _TOLERANCE:
                break
    return mode


def _density(features: Tensor, mode: Tensor, bandwidth: Tensor) -> Tensor:
    """Return the (V,) Gaussian densities of the features at the mode."""
    return torch.exp(-(features - mode).square().sum(1) / (2 * bandwidth))
