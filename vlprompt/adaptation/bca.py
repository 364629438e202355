"""BCA: class weights and class priors are updated by counting, as the stream names its images.

Paper: Zhou et al., "Bayesian Test-Time Adaptation for Vision-Language Models", CVPR 2025, arXiv 2503.09248, section 3.

The numbers are those of a public benchmark's configuration; the authors' own could not be compared.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from vlprompt.adaptation import ADAPTERS
from vlprompt.adaptation._features import Share, StreamAdapter, Views
from vlprompt.adaptation.views import Augment, ViewPlan
from vlprompt.learners import Learner

__all__ = ["BayesianAdapter"]

Fraction = Annotated[float, Field(ge=0, le=1)]


@ADAPTERS.register(
    "bca", summary="class weights and priors updated by counting; online, no gradients", paper="2503.09248"
)
class BayesianAdapter(StreamAdapter):
    """The answer is q = softmax(s <x, mu>) R; then mu and R of the named class take in x and q, if q is sure enough.

    An image is named before anything is learned from it.

    Args:
        learner: See :class:`FeatureAdapter`.
        likelihood_count: Images that a class weight counts for at the start.
        prior_count: The same for a row of R, which starts as a row of the identity.
        likelihood_threshold: Probability above which the class weight moves.
        prior_threshold: Probability above which the row of R moves.
        normalise: Whether x is made unit length, and rows of R and q add up to 1 again after each step.
        views: V, including the image itself.
        augment: See :class:`ViewPlan`.
        seed: Of the views.
        share: Share of the views that represent an image, the most confident ones.
    """

    updates_first = False

    def __init__(
        self,
        learner: Learner,
        *,
        likelihood_count: Annotated[float, Field(ge=0)] = 20000.0,
        prior_count: Annotated[float, Field(ge=0)] = 1.0,
        likelihood_threshold: Fraction = 0.05,
        prior_threshold: Fraction = 0.65,
        normalise: bool = True,
        views: Views = 64,
        augment: Augment = "crop_flip",
        seed: int = 0,
        share: Share = 0.1,
    ) -> None:
        super().__init__(learner, ViewPlan(views, augment, seed), share)
        self.likelihood_count = likelihood_count
        self.prior_count = prior_count
        self.likelihood_threshold = likelihood_threshold
        self.prior_threshold = prior_threshold
        self.normalise = normalise
        self.reset()

    def empty(self) -> dict[str, Tensor]:
        """See :meth:`StreamAdapter.empty`."""
        classes = len(self.weights)
        return {
            "means": self.weights.clone(),
            "priors": torch.eye(classes, device=self.weights.device),
            "likelihood_counts": self.weights.new_full((classes,), self.likelihood_count),
            "prior_counts": self.weights.new_full((classes,), self.prior_count),
        }

    def one(self, features: Tensor, logits: Tensor, confident: Tensor) -> tuple[Tensor, Tensor | None]:
        """See :meth:`StreamAdapter.one`."""
        means = self.memory["means"]
        priors = self.memory["priors"]
        feature = features[confident].mean(0)
        if self.normalise:
            feature = F.normalize(feature, dim=0)

        cosines = means @ feature
        probs = (self.scale * cosines).softmax(0) @ priors
        if self.normalise:
            probs = probs / probs.sum()

        surest, label = probs.max(0)
        sure = float(surest)
        named = int(label)
        if sure > self.likelihood_threshold:
            count = self.memory["likelihood_counts"][named]
            means[named] = F.normalize((count * means[named] + feature) / (count + 1), dim=0)
            count += 1
        if sure > self.prior_threshold:
            count = self.memory["prior_counts"][named]
            row = (count * priors[named] + probs) / (count + 1)
            priors[named] = row / row.sum() if self.normalise else row
            count += 1
        return probs, cosines
