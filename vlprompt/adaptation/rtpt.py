"""R-TPT: prompts tuned until each confident view is sure by itself; all views answer, weighted by their neighbours.

Paper: Sheng et al., "R-TPT: Improving Adversarial Robustness of Vision-Language Models through Test-Time Prompt
    Tuning", CVPR 2025, arXiv 2504.11195, section 4.

Where this differs from the published code: a view is left out of its own neighbours by its number, where that code
drops every cosine that is at least 1, so that rounding keeps some views among their own neighbours, and duplicates
vanish.
"""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from vlprompt.adaptation import ADAPTERS
from vlprompt.adaptation._prompts import PromptAdapter
from vlprompt.adaptation._tuning import Rate, Rule
from vlprompt.adaptation.selection import entropies
from vlprompt.adaptation.views import Augment, ViewPlan
from vlprompt.learners import Learner

__all__ = ["RobustPromptTuning", "neighbour_weights"]


@ADAPTERS.register(
    "rtpt",
    summary="prompts tuned on single views' entropies; all views answer, outliers hardly: for attacked images",
    paper="2504.11195",
    needs=("text gradients",),
)
class RobustPromptTuning(PromptAdapter):
    """Minimise the mean of the confident views' entropies; answer with the weighted mean of all views' tuned logits.

    A view's weight grows with its mean cosine with the other views nearest to it: an attack moves the image itself, and
    random crops of it less and in other directions.

    Args:
        learner: See :class:`PromptAdapter`.
        init: The words before the class name whose embeddings are tuned; None: "a photo of a".
        views: V, including the image itself.
        augment: See :class:`ViewPlan`; the paper adds AugMix on fine-grained data sets.
        seed: Of the views.
        share: Share of the views that prompts are tuned on, the most confident ones.
        steps: Updates per image.
        lr: Learning rate of AdamW.
        weight_decay: Of AdamW.
        together: Images whose later passes share one run of the text tower.
        neighbours: Nearest other views whose cosines are averaged; fewer where there are fewer.
        temperature: Of the weights; the smaller, the less outliers count.

    Raises:
        BackboneError: If learned context can't enter the backbone's text tower.
        DataError: If the learner has no prompts.
    """

    answers = "views"

    def __init__(
        self,
        learner: Learner,
        *,
        init: str | None = None,
        views: Annotated[int, Field(ge=1)] = 64,
        augment: Augment = "augmix",
        seed: int = 0,
        share: Annotated[float, Field(gt=0, le=1)] = 0.1,
        steps: Annotated[int, Field(ge=0)] = 1,
        lr: Rate = 5e-3,
        weight_decay: Rate = 0.01,
        together: Annotated[int, Field(ge=1)] = 8,
        neighbours: Annotated[int, Field(ge=1)] = 20,
        temperature: Annotated[float, Field(gt=0)] = 0.01,
    ) -> None:
        rule = Rule(steps, lr, weight_decay=weight_decay)
        super().__init__(learner, ViewPlan(views, augment, seed), rule, share, together)
        self.neighbours = neighbours
        self.temperature = temperature

    def loss(self, logits: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
        """See :meth:`PromptAdapter.loss`."""
        kept = mask.to(logits)
        return (entropies(logits) * kept).sum(-1) / kept.sum(-1)

    def answer(self, logits: Tensor, embeddings: Tensor) -> Tensor:
        """See :meth:`PromptAdapter.answer`."""
        weights = neighbour_weights(embeddings, self.neighbours, self.temperature)
        return (weights[..., None] * logits).sum(-2)


def neighbour_weights(embeddings: Tensor, neighbours: int = 20, temperature: float = 0.01) -> Tensor:
    """Return (..., V) weights of views that add up to 1: the softmax of their mean cosine with the nearest other views.

    Args:
        embeddings: (..., V, d) of views as the frozen tower sees them.
        neighbours: Other views that are averaged; all of them where there are fewer.
        temperature: Of the softmax.
    """
    features = F.normalize(embeddings.float(), dim=-1)
    views = features.shape[-2]
    if views == 1:
        return features.new_ones(features.shape[:-1])

    cosines = features @ features.transpose(-1, -2)
    cosines.diagonal(dim1=-2, dim2=-1).fill_(-2)  # below any cosine: no view is its own neighbour
    nearest = cosines.topk(min(neighbours, views - 1), dim=-1).values
    return (nearest.mean(-1) / temperature).softmax(-1)
