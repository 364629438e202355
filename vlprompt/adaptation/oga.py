"""OGA: Gaussian classes with one covariance, from a cache of confident images, beside the classifier.

Paper: Fuchs et al., "Online Gaussian Test-Time Adaptation of Vision-Language Models", arXiv 2501.04352, section 3.

The published code divides the sum of a class's cached features by all of its slots, also the empty ones;
``mean="slots"`` follows it, by default they are averages. Its cache is float16, here everything is float32.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from vlprompt.adaptation import ADAPTERS
from vlprompt.adaptation._features import Share, StreamAdapter, Views
from vlprompt.adaptation.selection import entropies
from vlprompt.adaptation.views import Augment, ViewPlan
from vlprompt.learners import Learner

__all__ = ["OnlineGaussian"]

_ENOUGH_FOR_MEAN = 2  # cached images of a class
_ENOUGH_FOR_COVARIANCE = 3
_SHRUNK_BELOW = 4  # images per dimension


@ADAPTERS.register(
    "oga",
    summary="Gaussian classes from a cache of confident images; online, no gradients",
    paper="2501.04352",
)
class OnlineGaussian(StreamAdapter):
    """Probabilities proportional to p_c exp(tau g_c), g the Gaussian log-likelihood and p the classifier's opinion.

    An image enters the cache under the class that the classifier gives it, in the place of the least certain one.

    Args:
        learner: See :class:`FeatureAdapter`.
        slots: Cached images of each class.
        tau: Weight of the likelihood.
        mean: ``"counts"`` averages the cached images; ``"slots"`` divides their sum by ``slots``.
        views: V, including the image itself.
        augment: See :class:`ViewPlan`.
        seed: Of the views.
        share: Share of the views that represent an image, the most confident ones.
    """

    def __init__(
        self,
        learner: Learner,
        *,
        slots: Annotated[int, Field(ge=1)] = 8,
        tau: Annotated[float, Field(ge=0)] = 0.05,
        mean: Literal["counts", "slots"] = "counts",
        views: Views = 1,
        augment: Augment = "crop_flip",
        seed: int = 0,
        share: Share = 0.1,
    ) -> None:
        super().__init__(learner, ViewPlan(views, augment, seed), share)
        self.slots = slots
        self.tau = tau
        self.mean: Literal["counts", "slots"] = mean
        self.reset()

    def empty(self) -> dict[str, Tensor]:
        """See :meth:`StreamAdapter.empty`."""
        classes, width = self.weights.shape
        return {
            "keys": self.weights.new_zeros(classes, self.slots, width),
            # An image that is as uncertain as can be is worth nothing.
            "entropy": self.weights.new_full((classes, self.slots), math.log(classes)),
            "filled": torch.zeros(classes, self.slots, dtype=torch.bool, device=self.weights.device),
            "directions": width * self.weights,
            "offsets": -0.5 * width * self.weights.square().sum(1),
        }

    def one(self, features: Tensor, logits: Tensor, confident: Tensor) -> tuple[Tensor, Tensor | None]:
        """See :meth:`StreamAdapter.one`."""
        feature = torch.nn.functional.normalize(features[confident].mean(0), dim=0)
        opinion = self.scale * self.weights @ feature
        self._offer(feature, int(opinion.argmax()), entropies(opinion))

        likelihoods = self.memory["directions"] @ feature + self.memory["offsets"]
        return (opinion.log_softmax(0) + self.tau * likelihoods).softmax(0), None

    def _offer(self, feature: Tensor, label: int, uncertainty: Tensor) -> None:
        """Put an image into the cache if it is more certain than another of its class, and fit the Gaussians again."""
        entropy = self.memory["entropy"]
        worst = int(entropy[label].argmax())
        if not bool(uncertainty < entropy[label, worst]):
            return
        self.memory["keys"][label, worst] = feature
        entropy[label, worst] = uncertainty
        self.memory["filled"][label, worst] = True

        # What an image is compared with changes only here, so it is kept instead of computed for every image.
        means = self.class_means()
        precision = self.precision(means)
        self.memory["directions"] = means @ precision
        self.memory["offsets"] = -0.5 * (self.memory["directions"] * means).sum(1)

    def class_means(self) -> Tensor:
        """Return (C, d) means; a class with too few images has its class weight."""
        counts = self.memory["filled"].sum(1)
        divisor = counts.clamp(min=1) if self.mean == "counts" else torch.full_like(counts, self.slots)
        means = self.memory["keys"].sum(1) / divisor[:, None]
        return torch.where((counts >= _ENOUGH_FOR_MEAN)[:, None], means, self.weights)

    def precision(self, means: Tensor) -> Tensor:
        """Return the (d, d) inverse covariance: d times the identity, shrunk or plain, as more images are there."""
        filled = self.memory["filled"]
        width = means.shape[1]
        identity = torch.eye(width, device=means.device)
        if int(filled.sum(1).max()) < _ENOUGH_FOR_COVARIANCE:
            return width * identity

        residuals = (self.memory["keys"] - means[:, None])[filled]
        residuals = residuals - residuals.mean(0)
        count = len(residuals)
        scatter = residuals.T @ residuals
        if count > _SHRUNK_BELOW * width:
            return torch.linalg.pinv(scatter / (count - 1), hermitian=True)

        trace = scatter.trace() / (count - 1)
        # Images that are all the same spread nowhere.
        shrunk = scatter + trace.clamp(min=1e-12) * identity
        return width * torch.cholesky_inverse(torch.linalg.cholesky(shrunk))
