"""OGA: Gaussian classes with one covariance, from a cache of confident images, beside the classifier.

Paper: Fuchs et al., "Online Gaussian Test-Time Adaptation of Vision-Language Models", arXiv 2501.04352, section 3.

The published code divides the sum of a class's cached features by all of its slots, also the empty ones;
``mean="slots"`` follows it, by default they are averages. Its cache is float16, here everything is float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from vlprompt.adaptation import ADAPTERS
from vlprompt.adaptation._features import Share, StreamAdapter, Views, confident_mean
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
            "means": self.weights.clone(),
            # Sums over cached images of r r^T and of r, r what an image differs from the mean of its class by.
            "scatter": self.weights.new_zeros(width, width),
            "residual": self.weights.new_zeros(width),
            # What an image is compared with changes only with the cache.
            "directions": width * self.weights,
            "offsets": -0.5 * width * self.weights.square().sum(1),
        }

    def many(
        self, features: Tensor, logits: Tensor, confident: Tensor
    ) -> Sequence[tuple[Tensor, Tensor | None]]:
        """See :meth:`StreamAdapter.many`."""
        images = F.normalize(confident_mean(features, confident), dim=1)
        opinions = self.scale * images @ self.weights.T
        labels = opinions.argmax(1).tolist()
        uncertainties = entropies(opinions)

        likelihoods = []
        for image, label, uncertainty in zip(images, labels, uncertainties, strict=True):
            self._offer(image, label, uncertainty)
            likelihoods.append(torch.addmv(self.memory["offsets"], self.memory["directions"], image))
        probs = (opinions.log_softmax(1) + self.tau * torch.stack(likelihoods)).softmax(1)
        return [(row, None) for row in probs]

    def _offer(self, image: Tensor, label: int, uncertainty: Tensor) -> None:
        """Put an image into the cache if it is more certain than another of its class, and fit the Gaussians again."""
        memory = self.memory
        entropy = memory["entropy"][label]
        worst = int(entropy.argmax())
        if not bool(uncertainty < entropy[worst]):
            return

        before = self._residuals(label)
        memory["keys"][label, worst] = image
        entropy[worst] = uncertainty
        memory["filled"][label, worst] = True
        memory["means"][label] = self._mean(label)
        after = self._residuals(label)

        # Only this class moved: its old share goes, its new one comes.
        memory["scatter"].addmm_(after.T, after).addmm_(before.T, before, alpha=-1)
        memory["residual"] += after.sum(0) - before.sum(0)
        memory["directions"] = self._directions()
        memory["offsets"] = -0.5 * torch.linalg.vecdot(memory["directions"], memory["means"])

    def class_means(self) -> Tensor:
        """Return (C, d) means; a class with too few images has its class weight."""
        return self.memory["means"]

    def _mean(self, label: int) -> Tensor:
        count = int(self.memory["filled"][label].sum())
        if count < _ENOUGH_FOR_MEAN:
            return self.weights[label]
        return self.memory["keys"][label].sum(0) / (count if self.mean == "counts" else self.slots)

    def _residuals(self, label: int) -> Tensor:
        """Return (n, d) differences of a class's cached images from its mean."""
        return self.memory["keys"][label][self.memory["filled"][label]] - self.memory["means"][label]

    def _directions(self) -> Tensor:
        """Return the (C, d) means times the inverse covariance, which is shrunk as long as there are few images."""
        means = self.memory["means"]
        width = means.shape[1]
        filled = self.memory["filled"].sum(1)
        if int(filled.max()) < _ENOUGH_FOR_COVARIANCE:
            return width * means

        count = int(filled.sum())
        residual = self.memory["residual"]
        scatter = torch.addr(self.memory["scatter"], residual, residual, alpha=-1 / count)
        if count > _SHRUNK_BELOW * width:
            return means @ torch.linalg.pinv(scatter / (count - 1), hermitian=True)

        # Images that are all the same spread nowhere.
        trace = (scatter.trace() / (count - 1)).clamp(min=1e-12)
        scatter.diagonal().add_(trace)
        return width * torch.cholesky_solve(means.T, torch.linalg.cholesky(scatter)).T
