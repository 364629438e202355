"""StatA: all images of a batch are named together, and classes that may be missing stay near their text.

Paper: Zanella et al., "Realistic Test-Time Adaptation of Vision-Language Models", CVPR 2025, arXiv 2501.03729,
    section 3.

Where this differs from the published code: that code divides running sums of the first variances by the number of
images once for every 2,500 images, so beyond that number they are too small; here they are means. A class without any
image has weight 0 and keeps its text, where that code divides by zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from vlprompt.adaptation import ADAPTERS
from vlprompt.adaptation._features import Share, Views
from vlprompt.adaptation._gaussian import GaussianAdapter, Gaussians, class_means, weighted_squares
from vlprompt.adaptation.views import Augment, ViewPlan
from vlprompt.learners import Learner

__all__ = ["StatisticalAnchor"]

_TINY = 1e-12


@ADAPTERS.register(
    "stata",
    summary="a batch of images together, anchored in the text, for any number of classes in it; no gradients",
    paper="2501.03729",
)
class StatisticalAnchor(GaussianAdapter):
    """TransCLIP with a covariance per class, and with Gaussians that are drawn to the text where few images are seen.

    With m_c images of class c, beta_c = m_c / (anchor + m_c) is the weight of what the images say, the rest that of the
    class weight t_c and of the variances v0 around all class weights.

    Args:
        learner: See :class:`FeatureAdapter`.
        batch: Images that are named together; None for all of them.
        anchor: Weight of the text, in images (the paper's alpha).
        soft: Whether m_c adds up assignments instead of counting images.
        rounds: How often the Gaussians are fitted.
        trust: Weight of the classifier's opinion (the paper's lambda).
        smooth: Weight of the graph.
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
        anchor: Annotated[float, Field(gt=0)] = 1.0,
        soft: bool = False,
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
        self.anchor = anchor
        self.soft = soft

    def classes_of(self, features: Tensor, logits: Tensor) -> tuple[Gaussians, Callable[[Tensor], Gaussians]]:
        """See :meth:`GaussianAdapter.classes_of`."""
        texts = self.weights.to(features)
        first = logits.softmax(1)
        spread = weighted_squares(features, first, texts).sum(0, keepdim=True) / len(features)
        start = Gaussians(texts, spread.expand_as(texts), True)

        def fit(z: Tensor) -> Gaussians:
            classes = z.shape[1]
            seen = z.sum(0) if self.soft else z.argmax(1).bincount(minlength=classes).to(z)
            beta = (seen / (self.anchor + seen))[:, None]

            means = F.normalize(beta * class_means(features, z) + (1 - beta) * texts, dim=1)
            observed = weighted_squares(features, z, means) / z.sum(0).clamp(min=_TINY)[:, None]
            variances = beta * observed + (1 - beta) * (spread + (texts - means).square())
            return Gaussians(means, variances, True)

        return start, fit
