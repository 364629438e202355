"""OnZeta: labels that the text gives are balanced over the stream, and a second set of class weights learns from them.

Paper: Qian and Hu, "Online Zero-Shot Classification with CLIP", ECCV 2024, arXiv 2408.13320, section 3.

It takes for granted that classes are about equally frequent, and rare ones are lifted; where they come one after
another it loses. The authors know the length of the stream; ``horizon`` says it, and 0 does without.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from vlprompt.adaptation import ADAPTERS
from vlprompt.adaptation._features import Share, StreamAdapter, Views
from vlprompt.adaptation.views import Augment, ViewPlan
from vlprompt.learners import Learner

__all__ = ["OnlineZeroShot"]

Positive = Annotated[float, Field(gt=0)]
Rate = Annotated[float, Field(ge=0)]


@ADAPTERS.register(
    "onzeta", summary="balanced labels and class weights for images; online, no gradients", paper="2408.13320"
)
class OnlineZeroShot(StreamAdapter):
    """The answer is b v + (1 - b) q, q the balanced text labels, v those of class weights W that learn to repeat q.

    An image is named before anything is learned from it.

    Args:
        learner: See :class:`FeatureAdapter`.
        beta: Highest share b of v; it grows with the square root of the share of the stream that has been seen.
        horizon: Images of the stream; 0 if it is unknown: b is ``beta`` from the start.
        balance: Least frequency that a class should have, in units of 1/C (the paper's alpha).
        text_temperature: Of the text labels.
        image_temperature: Of v.
        balance_rate: Step of the balance at the first image (c_r).
        weight_rate: Step of W at the first image (c_w).
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
        beta: Annotated[float, Field(ge=0, le=1)] = 0.8,
        horizon: Annotated[int, Field(ge=0)] = 0,
        balance: Annotated[float, Field(ge=0)] = 1.0,
        text_temperature: Positive = 0.01,
        image_temperature: Positive = 0.04,
        balance_rate: Rate = 20.0,
        weight_rate: Rate = 0.5,
        views: Views = 1,
        augment: Augment = "crop_flip",
        seed: int = 0,
        share: Share = 0.1,
    ) -> None:
        super().__init__(learner, ViewPlan(views, augment, seed), share)
        self.beta = beta
        self.horizon = horizon
        self.balance = balance
        self.text_temperature = text_temperature
        self.image_temperature = image_temperature
        self.balance_rate = balance_rate
        self.weight_rate = weight_rate
        self.reset()

    def empty(self) -> dict[str, Tensor]:
        """See :meth:`StreamAdapter.empty`."""
        return {
            "weights": self.weights.clone(),
            "lift": self.weights.new_zeros(len(self.weights)),
            "seen": torch.zeros((), dtype=torch.long),
        }

    def one(self, features: Tensor, logits: Tensor, confident: Tensor) -> tuple[Tensor, Tensor | None]:
        """See :meth:`StreamAdapter.one`."""
        weights = self.memory["weights"]
        lift = self.memory["lift"]
        number = int(self.memory["seen"]) + 1
        feature = F.normalize(features[confident].mean(0), dim=0)

        # In logarithms: the lift may be large.
        text = ((self.weights @ feature) / self.text_temperature + lift).softmax(0)
        cosines = weights @ feature
        image = (cosines / self.image_temperature).softmax(0)
        progress = math.sqrt(min(number / self.horizon, 1.0)) if self.horizon else 1.0
        share = self.beta * progress
        probs = share * image + (1 - share) * text

        slower = math.sqrt(number)
        lift -= self.balance_rate / slower * (text - self.balance / len(text))
        lift.clamp_(min=0)
        step = self.weight_rate / (self.image_temperature * slower)
        weights.addr_(image - text, feature, alpha=-step)
        self.memory["weights"] = F.normalize(weights, dim=1)
        self.memory["seen"] += 1
        return probs, cosines
