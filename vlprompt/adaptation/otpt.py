"""O-TPT: TPT that also makes the class weights orthogonal, for calibration.

Paper: Sharifdeen et al., "O-TPT: Orthogonality Constraints for Calibrating Test-time Prompt Tuning in Vision-Language
    Models", CVPR 2025, arXiv 2503.12096, section 4.

The published code reflects every row of G = T T^T onto its axis by a Householder matrix of its own, C^3 numbers, and
takes what is left of |G_c| - 1. A reflection keeps lengths, so this is the mean of |G_c| - 1 over rows: ``rows``. The
paper's formula is |G - I|^2: ``frobenius``.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from vlprompt.adaptation import ADAPTERS
from vlprompt.adaptation._prompts import PromptAdapter
from vlprompt.adaptation._tuning import Rate, Rule
from vlprompt.adaptation.objectives import marginal_entropy
from vlprompt.adaptation.views import Augment, ViewPlan
from vlprompt.learners import Learner

__all__ = ["OrthogonalPromptTuning", "excess"]


@ADAPTERS.register(
    "otpt",
    summary="TPT that also makes the class weights orthogonal, for calibration",
    paper="2503.12096",
    needs=("text gradients",),
)
class OrthogonalPromptTuning(PromptAdapter):
    """Minimise marginal entropy + orthogonality * how far the class weights are from orthogonal.

    Args:
        learner: See :class:`PromptAdapter`.
        init: The words before the class name whose embeddings are tuned; None: "a photo of a".
        views: V, including the image itself.
        augment: See :class:`ViewPlan`.
        seed: Of the views.
        share: Share of the views that are used, the most confident ones.
        steps: Updates per image.
        lr: Learning rate of AdamW.
        weight_decay: Of AdamW.
        together: Images whose later passes share one run of the text tower.
        orthogonality: Weight of the penalty (the paper's lambda: 18 on fine-grained data sets, 2 under shift).
        penalty: ``"rows"`` as in the published code, ``"frobenius"`` as in the paper.

    Raises:
        BackboneError: If learned context can't enter the backbone's text tower.
        DataError: If the learner has no prompts.
    """

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
        orthogonality: Annotated[float, Field(ge=0)] = 18.0,
        penalty: Literal["rows", "frobenius"] = "rows",
    ) -> None:
        rule = Rule(steps, lr, weight_decay=weight_decay)
        super().__init__(learner, ViewPlan(views, augment, seed), rule, share, together)
        self.orthogonality = orthogonality
        self.penalty: Literal["rows", "frobenius"] = penalty

    def loss(self, logits: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
        """See :meth:`PromptAdapter.loss`."""
        return marginal_entropy(logits, mask) + self.orthogonality * excess(weights, self.penalty)


def excess(weights: Tensor, penalty: Literal["rows", "frobenius"] = "rows") -> Tensor:
    """Return how far class weights are from orthogonal; 0 for orthonormal ones.

    Args:
        weights: (..., C, d), unit length.
        penalty: ``"rows"``: the mean over classes of |G_c| - 1; ``"frobenius"``: |G - I|^2, G the cosines of all
            classes.

    Returns:
        (...).
    """
    cosines = weights @ weights.transpose(-1, -2)
    if penalty == "rows":
        return cosines.norm(dim=-1).mean(-1) - 1
    identity = torch.eye(cosines.shape[-1], dtype=cosines.dtype, device=cosines.device)
    return (cosines - identity).square().sum((-1, -2))
