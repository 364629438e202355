"""DPE: class weights and image prototypes are both moved for each image; class weights keep what sure images moved.

Paper: Zhang et al., "Dual Prototype Evolving for Test-Time Generalization of Vision-Language Models", NeurIPS 2024,
    arXiv 2410.12790, section 3.

The first step of AdamW from zero with its epsilon of 1e-3 is -lr g / (|g| + 1e-3), no step of signs; weight decay of
zero is zero. The authors' configurations choose the numbers for each data set; here there is one of each, as the
paper says. Their tables use sentences of a language model.
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
from vlprompt.adaptation.objectives import marginal_entropy
from vlprompt.adaptation.selection import entropies, lowest_entropy
from vlprompt.adaptation.views import Augment, ViewPlan
from vlprompt.learners import Learner

__all__ = ["DualPrototypes"]

_EPSILON = 1e-3  # of AdamW
_ALIGNMENT_TEMPERATURE = 0.01
_TINY = 1e-12
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

    def many(
        self, features: Tensor, logits: Tensor, confident: Tensor
    ) -> Sequence[tuple[Tensor, Tensor | None]]:
        """See :meth:`StreamAdapter.many`."""
        # Prototypes of all classes, those of absent ones 0; each image changes one of them.
        present = self.memory["entropy"].isfinite()
        counts = present.sum(1, keepdim=True)
        prototypes = self.memory["keys"].sum(1) / counts.clamp(min=1)
        classes = present.any(1).nonzero()[:, 0]
        unit = F.normalize(self.memory["weights"], dim=1)

        answers = []
        for views in features:
            chosen = lowest_entropy(self.scale * views @ unit.T, self.share)
            feature = confident_mean(views[None], chosen[None])[0]
            known = self.scale * views[chosen] @ unit.T
            label = int(known.mean(0).argmax())
            if self._offer(feature, label, self._uncertainty(marginal_entropy(known))):
                count = int(self.memory["entropy"][label].isfinite().sum())
                prototypes[label] = self.memory["keys"][label].sum(0) / count
                if count == 1:
                    classes = self.memory["entropy"].isfinite().any(1).nonzero()[:, 0]

            moved = self._step(prototypes[classes], classes, feature)
            probs, cosines = self._named(views, moved, classes)
            answers.append((probs.softmax(0), cosines))

            if float(self._uncertainty(entropies(probs))) < self.sure:
                self.memory["accepted"] += 1
                accepted = int(self.memory["accepted"])
                mean = (accepted * self.memory["weights"] + moved[: len(unit)]) / (accepted + 1)
                self.memory["weights"] = mean
                unit = F.normalize(mean, dim=1)
        return answers

    def _named(self, views: Tensor, moved: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the (C,) logits of an image, and its cosines with the moved class weights."""
        count = len(self.weights)
        asked = views[0]
        if self.query == "confident":
            chosen = lowest_entropy(self.scale * views @ moved[:count].T, self.share)
            asked = views[chosen].mean(0)
        cosines = moved @ asked
        votes = self._votes(cosines[count:])
        return (self.scale * cosines[:count]).index_add(0, classes, votes), cosines[:count]

    def _step(self, prototypes: Tensor, classes: Tensor, feature: Tensor) -> Tensor:
        """Return (C + M, d) class weights and prototypes of M classes after one step from both, unit length.

        The loss is the entropy of softmax(s <f, T> + votes of P) and ``alignment`` times InfoNCE; its gradient is
        written out, with respect to unit rows first, then to the rows.
        """
        count = len(self.weights)
        start = torch.cat([self.memory["weights"], prototypes])
        lengths = torch.linalg.vector_norm(start, dim=1, keepdim=True).clamp(min=_TINY)
        unit = start / lengths
        cosines = unit @ feature

        votes = self._votes(cosines[count:])
        log_probs = (self.scale * cosines[:count]).index_add(0, classes, votes).log_softmax(0)
        probs = log_probs.exp()
        slopes = -probs * (log_probs - (probs * log_probs).sum())
        slopes = torch.cat([self.scale * slopes, slopes[classes] * self.beta * votes])
        gradient = torch.outer(slopes, feature)

        if self.alignment:
            text, image = unit[classes], unit[count:]
            errors = (image @ text.T / _ALIGNMENT_TEMPERATURE).softmax(1)
            errors.diagonal().sub_(1)
            errors *= self.alignment / (_ALIGNMENT_TEMPERATURE * len(classes))
            gradient.index_add_(0, classes, errors.T @ image)
            gradient[count:].addmm_(errors, text)

        # What points along a row is lost in its normalisation.
        along = torch.linalg.vecdot(gradient, unit)
        gradient.addcmul_(along[:, None], unit, value=-1).div_(lengths)
        step = gradient.div_(gradient.abs().add_(_EPSILON))
        return F.normalize(start.sub_(step, alpha=self.lr), dim=1)

    def _votes(self, cosines: Tensor) -> Tensor:
        """Return (M,) logits that prototypes add to their classes, from their cosines with an image."""
        return self.alpha * (-self.beta * (1 - cosines)).exp()

    def _offer(self, feature: Tensor, label: int, uncertainty: Tensor) -> bool:
        """Put an image into a free slot of its class or in the place of a less certain one; return whether it was."""
        entropy = self.memory["entropy"]
        worst = int(entropy[label].argmax())
        if not bool(uncertainty < entropy[label, worst]):
            return False
        self.memory["keys"][label, worst] = feature
        entropy[label, worst] = uncertainty
        return True

    def _uncertainty(self, entropy: Tensor) -> Tensor:
        """Return an entropy in nats / log2 C, as the authors measure it."""
        return entropy / math.log2(len(self.weights))
