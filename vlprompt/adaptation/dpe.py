"""DPE: class weights and image prototypes are both moved for each image; class weights keep what sure images moved.

Paper: Zhang et al., "Dual Prototype Evolving for Test-Time Generalization of Vision-Language Models", NeurIPS 2024,
    arXiv 2410.12790, section 3.

The first step of AdamW from zero with its epsilon of 1e-3 is -lr g / (|g| + 1e-3), no step of signs; weight decay of
zero is zero. The authors' configurations choose the numbers for each data set; here there is one of each, as the
paper says. Their tables use sentences of a language model.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from vlprompt.adaptation import ADAPTERS
from vlprompt.adaptation._features import Share, StreamAdapter, Views
from vlprompt.adaptation.objectives import marginal_entropy
from vlprompt.adaptation.selection import entropies, lowest_entropy
from vlprompt.adaptation.views import Augment, ViewPlan
from vlprompt.learners import Learner

__all__ = ["DualPrototypes"]

_EPSILON = 1e-3  # of AdamW
_ALIGNMENT_TEMPERATURE = 0.01
Rate = Annotated[float, Field(ge=0)]


@ADAPTERS.register(
    "dpe",
    summary="class weights and image prototypes that move together; online, gradients of features alone",
    paper="2410.12790",
)
class DualPrototypes(StreamAdapter):
    """Logits s <f, T'> + alpha exp(-beta (1 - <f, P'>)), T' and P' one step from class weights T and prototypes P.

    The step goes down entropy + alignment * InfoNCE(P' -> T'). P are the means of up to ``slots`` images of each class.
    After a sure answer T becomes the running mean of itself and T'.

    Args:
        learner: See :class:`FeatureAdapter`.
        slots: Images of each class that make its prototype, the most certain ones.
        alpha: Weight of the prototypes.
        beta: Their sharpness.
        lr: Size of both steps.
        alignment: Weight of InfoNCE (the paper's lambda).
        sure: Entropy below which T moves, in nats / log2 C.
        query: What is named: the image itself, or the mean of its confident views (the authors, on ImageNet-A).
        views: V, including the image itself.
        augment: See :class:`ViewPlan`.
        seed: Of the views.
        share: Share of the views that represent an image, the most confident ones.
    """

    def __init__(
        self,
        learner: Learner,
        *,
        slots: Annotated[int, Field(ge=1)] = 3,
        alpha: Annotated[float, Field(ge=0)] = 6.0,
        beta: Annotated[float, Field(ge=0)] = 5.0,
        lr: Rate = 5e-4,
        alignment: Annotated[float, Field(ge=0)] = 0.5,
        sure: Annotated[float, Field(ge=0, le=1)] = 0.1,
        query: Literal["image", "confident"] = "image",
        views: Views = 64,
        augment: Augment = "augmix",
        seed: int = 0,
        share: Share = 0.1,
    ) -> None:
        super().__init__(learner, ViewPlan(views, augment, seed), share)
        self.slots = slots
        self.alpha = alpha
        self.beta = beta
        self.lr = lr
        self.alignment = alignment
        self.sure = sure
        self.query: Literal["image", "confident"] = query
        self.reset()

    def empty(self) -> dict[str, Tensor]:
        """See :meth:`StreamAdapter.empty`."""
        classes, width = self.weights.shape
        return {
            "weights": self.weights.clone(),
            "accepted": torch.zeros((), dtype=torch.long),
            "keys": self.weights.new_zeros(classes, self.slots, width),
            # An infinite entropy marks a free slot: any image is more certain.
            "entropy": self.weights.new_full((classes, self.slots), torch.inf),
        }

    def one(self, features: Tensor, logits: Tensor, confident: Tensor) -> tuple[Tensor, Tensor | None]:
        """See :meth:`StreamAdapter.one`."""
        weights = self.memory["weights"]  # a running mean, not unit length
        logits = self.scale * features @ F.normalize(weights, dim=1).T
        chosen = lowest_entropy(logits, self.share)
        feature = features[chosen].mean(0)
        self._offer(
            feature, int(logits[chosen].mean(0).argmax()), self._uncertainty(marginal_entropy(logits[chosen]))
        )

        present = self.memory["entropy"].isfinite()
        classes = present.any(1).nonzero()[:, 0]
        counts = present[classes].sum(1, keepdim=True)
        # Free slots hold zeros.
        prototypes = self.memory["keys"][classes].sum(1) / counts
        moved, moved_prototypes = self._step(weights, prototypes, classes, feature)

        asked = features[0]
        if self.query == "confident":
            chosen = lowest_entropy(self.scale * features @ moved.T, self.share)
            asked = features[chosen].mean(0)
        cosines = moved @ asked
        answer = self.scale * cosines + self._votes(asked, moved_prototypes, classes)

        if float(self._uncertainty(entropies(answer))) < self.sure:
            self.memory["accepted"] += 1
            count = int(self.memory["accepted"])
            self.memory["weights"] = (count * weights + moved) / (count + 1)
        return answer.softmax(0), cosines

    def _step(
        self, weights: Tensor, prototypes: Tensor, classes: Tensor, feature: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return (C, d) class weights and (M, d) prototypes after one step from both, unit length."""
        with torch.enable_grad():
            text = weights.clone().requires_grad_()
            image = prototypes.clone().requires_grad_()
            unit_text = F.normalize(text, dim=1)
            unit_image = F.normalize(image, dim=1)

            logits = self.scale * unit_text @ feature + self._votes(feature, unit_image, classes)
            cosines = unit_image @ unit_text[classes].T / _ALIGNMENT_TEMPERATURE
            own = torch.arange(len(classes), device=cosines.device)
            loss = marginal_entropy(logits[None]) + self.alignment * F.cross_entropy(cosines, own)
            gradients = torch.autograd.grad(loss, (text, image))

        moved = []
        for start, gradient in zip((weights, prototypes), gradients, strict=True):
            moved.append(F.normalize(start - self.lr * gradient / (gradient.abs() + _EPSILON), dim=1))
        return moved[0], moved[1]

    def _votes(self, feature: Tensor, prototypes: Tensor, classes: Tensor) -> Tensor:
        """Return (C,) logits that the prototypes add; absent classes get none."""
        votes = self.alpha * (-self.beta * (1 - prototypes @ feature)).exp()
        return feature.new_zeros(len(self.weights)).index_add(0, classes, votes)

    def _offer(self, feature: Tensor, label: int, uncertainty: Tensor) -> None:
        """Put an image into a free slot of its class, or in the place of a less certain one."""
        entropy = self.memory["entropy"]
        worst = int(entropy[label].argmax())
        if bool(uncertainty < entropy[label, worst]):
            self.memory["keys"][label, worst] = feature
            entropy[label, worst] = uncertainty

    def _uncertainty(self, entropy: Tensor) -> Tensor:
        """Return an entropy in nats / log2 C, as the authors measure it."""
        return entropy / math.log2(len(self.weights))
