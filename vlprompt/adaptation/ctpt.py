"""C-TPT: TPT that also spreads the class weights, which makes its confidence better calibrated.

Paper: Yoon et al., "C-TPT: Calibrated Test-Time Prompt Tuning for Vision-Language Models via Text Feature Dispersion",
    ICLR 2024, arXiv 2403.14119, section 4.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from vlprompt.adaptation import ADAPTERS
from vlprompt.adaptation._prompts import PromptAdapter
from vlprompt.adaptation._tuning import Rate, Rule
from vlprompt.adaptation.objectives import dispersion, marginal_entropy
from vlprompt.adaptation.views import Augment, ViewPlan
from vlprompt.learners import Learner

__all__ = ["CalibratedPromptTuning"]


@ADAPTERS.register(
    "ctpt",
    summary="TPT that also spreads the class weights, for calibration",
    paper="2403.14119",
    needs=("text gradients",),
)
class CalibratedPromptTuning(PromptAdapter):
    """Minimise marginal entropy - spread * dispersion of the class weights.

    Args:
        learner: See :class:`PromptAdapter`.
        init: The words before the class name whose embeddings are tuned; None: "a photo of a".
        views: V, including the image itself.
        augment: See :class:`ViewPlan`; the authors use AugMix throughout.
        seed: Of the views.
        share: Share of the views that are used, the most confident ones.
        steps: Updates per image.
        lr: Learning rate of AdamW.
        weight_decay: Of AdamW.
        together: Images whose later passes share one run of the text tower.
        spread: Weight of the dispersion (the paper's lambda: 50 on fine-grained data sets, 20 under shift).

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
        spread: Annotated[float, Field(ge=0)] = 50.0,
    ) -> None:
        rule = Rule(steps, lr, weight_decay=weight_decay)
        super().__init__(learner, ViewPlan(views, augment, seed), rule, share, together)
        self.spread = spread

    def loss(self, logits: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
        """See :meth:`PromptAdapter.loss`."""
        return marginal_entropy(logits, mask) - self.spread * dispersion(weights)
