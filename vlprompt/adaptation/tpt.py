"""TPT: tune the prompt on one image until its confident views agree.

Paper: Shu et al., "Test-Time Prompt Tuning for Zero-Shot Generalization in Vision-Language Models", NeurIPS 2022,
    arXiv 2209.07511, section 3.

Where this differs from the published code: float32 without a loss scaler, whose state made results depend on the
order of images; at least one view is always kept; views come from a generator of their own.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from vlprompt.adaptation import ADAPTERS
from vlprompt.adaptation._prompts import PromptAdapter
from vlprompt.adaptation._tuning import GradientTransform, Rate, Rule
from vlprompt.adaptation.views import Augment, ViewPlan
from vlprompt.learners import Learner

__all__ = ["PromptTuning"]


@ADAPTERS.register(
    "tpt",
    summary="prompts tuned per image until its confident views agree",
    paper="2209.07511",
    needs=("text gradients",),
)
class PromptTuning(PromptAdapter):
    """Minimise the entropy of the confident views' mean prediction, predict the image itself, forget.

    Args:
        learner: See :class:`PromptAdapter`.
        init: The words before the class name whose embeddings are tuned; None: "a photo of a".
        views: V, including the image itself.
        augment: See :class:`ViewPlan`; the paper adds AugMix on fine-grained data sets.
        seed: Of the views.
        share: Share of the views that are used, the most confident ones (the paper's rho).
        steps: Updates per image.
        lr: Learning rate.
        optimizer: Fresh for every image.
        weight_decay: Of AdamW; PyTorch's default, as in the authors' code.
        together: Images whose later passes share one run of the text tower; this changes results by no more than
            float precision.
        transform: Applied to the gradients before each step, one row per image.

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
        augment: Augment = "crop_flip",
        seed: int = 0,
        share: Annotated[float, Field(gt=0, le=1)] = 0.1,
        steps: Annotated[int, Field(ge=0)] = 1,
        lr: Rate = 5e-3,
        optimizer: Literal["adamw", "sgd"] = "adamw",
        weight_decay: Rate = 0.01,
        together: Annotated[int, Field(ge=1)] = 8,
        transform: GradientTransform | None = None,
    ) -> None:
        rule = Rule(steps, lr, optimizer, weight_decay, transform)
        super().__init__(learner, ViewPlan(views, augment, seed), rule, share, together)
