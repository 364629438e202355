"""TPS: class weights are shifted for each image by one step that makes its confident views agree.

Paper: Sui et al., "Just Shift It: Test-Time Prototype Shifting for Zero-Shot Generalization with Vision-Language
    Models", WACV 2025, arXiv 2403.12952, section 3.

A first step of AdamW from zero is -lr g / (|g| + 1e-8), so gradients are written out and no optimiser is built. The
paper's tables use sentences of a language model; with the same few templates for all methods figures are lower.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from vlprompt.adaptation import ADAPTERS
from vlprompt.adaptation._features import FeatureAdapter, Share, Views
from vlprompt.adaptation.base import Adapted, EncodedViews
from vlprompt.adaptation.views import Augment, ViewPlan
from vlprompt.learners import Learner

__all__ = ["PrototypeShift", "entropy_gradient"]

_EPSILON = 1e-8  # of AdamW
_TOGETHER = 2**18  # numbers of the shifts of images that are computed at once; they fit into a core's cache


@ADAPTERS.register(
    "tps",
    summary="class weights shifted for each image by one step; no pass through a tower",
    paper="2403.12952",
)
class PrototypeShift(FeatureAdapter):
    """Class weights n(T + S) with S one step down the marginal entropy of the confident views; view 0 is named.

    Args:
        learner: See :class:`FeatureAdapter`.
        lr: Size of the step of every number (the authors: 0.005 under shift, 0.001 on fine-grained data sets).
        views: V, including the image itself.
        augment: See :class:`ViewPlan`.
        seed: Of the views.
        share: Share of the views that represent an image, the most confident ones.
    """

    def __init__(
        self,
        learner: Learner,
        *,
        lr: Annotated[float, Field(ge=0)] = 5e-3,
        views: Views = 64,
        augment: Augment = "crop_flip",
        seed: int = 0,
        share: Share = 0.1,
    ) -> None:
        super().__init__(learner, ViewPlan(views, augment, seed), share)
        self.lr = lr

    @torch.no_grad()
    def adapt(self, views: EncodedViews) -> Adapted:
        """See :meth:`Adapter.adapt`."""
        features, logits, mask = self.opened(views)
        together = max(1, _TOGETHER // self.weights.numel())
        rows = []
        for parts in zip(features.split(together), logits.split(together), mask.split(together), strict=True):
            rows.append(self._shifted(*parts))
        cosines = torch.cat(rows)
        return Adapted((self.scale * cosines).softmax(-1), mask, cosines)

    def _shifted(self, features: Tensor, logits: Tensor, mask: Tensor) -> Tensor:
        """Return the (G, C) cosines of G images with their own shifted class weights."""
        outer = self.scale * entropy_gradient(logits, mask)
        # A class weight has unit length, so what points along it is lost in the normalisation.
        along = (outer * logits).sum(1) / self.scale
        gradient = outer.transpose(1, 2) @ features  # (G, C, d)
        gradient.addcmul_(along[..., None], self.weights, value=-1)

        # In place: these are the only tensors of this size, and passes over them are all that takes time.
        shifted = gradient.div_(gradient.abs().add_(_EPSILON)).mul_(-self.lr).add_(self.weights)
        lengths = torch.linalg.vector_norm(shifted, dim=-1)
        return (shifted @ features[:, 0, :, None])[..., 0] / lengths


def entropy_gradient(logits: Tensor, mask: Tensor) -> Tensor:
    """Return the (G, V, C) gradient of the marginal entropy of the kept views with respect to the logits.

    Args:
        logits: (G, V, C).
        mask: (G, V) mask of the kept views, at least one each.
    """
    kept = mask.to(logits)[..., None]
    count = kept.sum(1, keepdim=True)
    probs = logits.softmax(-1) * kept
    mean = probs.sum(1, keepdim=True) / count
    # A probability of 0 contributes nothing, whatever its logarithm.
    outer = -mean.clamp(min=torch.finfo(mean.dtype).tiny).log() / count
    return probs * (outer - (probs * outer).sum(-1, keepdim=True))
