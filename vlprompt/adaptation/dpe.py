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
from pydantic import Field
from torch import Tensor

from vlprompt.adaptation import ADAPTERS
from vlprompt.adaptation._features import Share, StreamAdapter, Views
from vlprompt.adaptation.objectives import marginal_entropy
from vlprompt.adaptation.selection import lowest_entropy
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
        rows = self._rows()
        answers = []
        for views in features:
            view_logits = self.scale * views @ rows.text.T
            chosen = lowest_entropy(view_logits, self.share)
            feature = views[chosen].mean(0)
            known = view_logits[chosen]
            label = int(known.mean(0).argmax())
            if self._offer(feature, label, self._uncertainty(marginal_entropy(known))):
                # Of all prototypes that of one class has changed, or there is one more.
                count = int(self.memory["entropy"][label].isfinite().sum())
                if count == 1:
                    rows = self._rows()
                else:
                    place = int((rows.classes == label).nonzero())
                    rows.set_prototype(place, self.memory["keys"][label].sum(0) / count)

            moved, lengths = self._step(rows, feature)
            answer, cosines = self._named(views, moved, lengths, rows.classes)
            probs = answer.softmax(0)
            answers.append((probs, cosines))

            if float(self._uncertainty(torch.special.entr(probs).sum())) < self.sure:
                self.memory["accepted"] += 1
                accepted = int(self.memory["accepted"])
                mean = self.memory["weights"]
                mean.mul_(accepted / (accepted + 1))
                mean.addcdiv_(moved[: len(mean)], lengths[: len(mean), None] * (accepted + 1))
                rows.set_text(mean)
        return answers

    def _rows(self) -> _Rows:
        """Return class weights, and prototypes of the classes that have one."""
        present = self.memory["entropy"].isfinite()
        classes = present.any(1).nonzero()[:, 0]
        prototypes = self.memory["keys"][classes].sum(1) / present[classes].sum(1, keepdim=True)
        return _Rows(self.memory["weights"], prototypes, classes)

    def _named(self, views: Tensor, moved: Tensor, lengths: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the (C,) logits of an image, and its cosines with the moved class weights.

        Args:
            views: (V, d).
            moved: See :meth:`_step`.
            lengths: See there.
            classes: (M,).
        """
        count = len(self.weights)
        asked = views[0]
        if self.query == "confident":
            logits = self.scale * (views @ moved[:count].T) / lengths[:count]
            asked = views[lowest_entropy(logits, self.share)].mean(0)
        cosines = (moved @ asked).div_(lengths)
        votes = self._votes(cosines[count + 1 :])
        return (self.scale * cosines[:count]).index_add_(0, classes, votes), cosines[:count]

    def _step(self, rows: _Rows, feature: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``rows.moved``, ``rows.start`` after one step, and the lengths of its rows; row C means nothing.

        The loss is the entropy of softmax(s <f, T> + votes of P) and ``alignment`` times InfoNCE; its gradient is
        written out, with respect to unit rows first, then to the rows. With respect to unit rows it is a sum of the
        others and of the image, so two products of matrices give all of it.

        Args:
            rows: Where the step begins.
            feature: (d,).
        """
        count = len(self.weights)
        classes = rows.classes
        unit = rows.unit
        unit[count] = feature
        cosines = unit @ feature

        votes = self._votes(cosines[count + 1 :])
        log_probs = (self.scale * cosines[:count]).index_add_(0, classes, votes).log_softmax(0)
        probs = log_probs.exp()
        slopes = probs * ((probs * log_probs).sum() - log_probs)

        # What each unit row's gradient takes of the unit rows, and how much of it points along the row.
        to_text = unit.new_zeros(count, 1 + len(classes))
        to_image = unit.new_zeros(len(classes), count + 1)
        to_text[:, 0] = self.scale * slopes
        to_image[:, count] = slopes.index_select(0, classes) * self.beta * votes
        along = torch.zeros_like(cosines)
        along[:count] = to_text[:, 0] * cosines[:count]
        along[count + 1 :] = to_image[:, count] * cosines[count + 1 :]

        if self.alignment:
            similarities = (rows.image @ rows.text.T).index_select(1, classes)
            errors = (similarities / _ALIGNMENT_TEMPERATURE).softmax(1)
            errors.diagonal().sub_(1)
            errors *= self.alignment / (_ALIGNMENT_TEMPERATURE * len(classes))
            to_text[:, 1:].index_copy_(0, classes, errors.T)
            to_image.index_copy_(1, classes, errors)
            similarities.mul_(errors)
            along[:count].index_add_(0, classes, similarities.sum(0))
            along[count + 1 :] += similarities.sum(1)

        # What points along a row is lost in its normalisation.
        lengths = rows.lengths[:, None]
        gradient, moved = rows.gradient, rows.moved
        torch.mm(to_text.div_(lengths[:count]), unit[count:], out=gradient[:count])
        torch.mm(to_image.div_(lengths[count + 1 :]), unit[: count + 1], out=gradient[count + 1 :])
        gradient.addcmul_(along[:, None] / lengths, unit, value=-1)
        torch.abs(gradient, out=moved).add_(_EPSILON)
        torch.addcdiv(rows.start, gradient, moved, value=-self.lr, out=moved)
        return moved, torch.linalg.vector_norm(moved, dim=1).clamp_(min=_TINY)

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


class _Rows:
    """Class weights and prototypes, as they are and at unit length; one row between them is for an image.

    Args:
        text: (C, d).
        image: (M, d) prototypes.
        classes: (M,) of the prototypes.

    Attributes:
        start: (C + 1 + M, d).
        lengths: (C + 1 + M,).
        unit: (C + 1 + M, d).
        classes: (M,).
        gradient: (C + 1 + M, d), as the next for a step to write to.
        moved: (C + 1 + M, d).
    """

    def __init__(self, text: Tensor, image: Tensor, classes: Tensor) -> None:
        self.classes = classes
        self.start = torch.cat([text, text.new_zeros(1, text.shape[1]), image])
        self.lengths = torch.linalg.vector_norm(self.start, dim=1).clamp_(min=_TINY)
        self.unit = self.start / self.lengths[:, None]
        self._count = len(text)

        # Where a step works; memory that is asked for in each step would cost as much as the products.
        self.gradient = torch.zeros_like(self.start)
        self.moved = torch.empty_like(self.start)

    @property
    def text(self) -> Tensor:
        """(C, d) unit-length class weights."""
        return self.unit[: self._count]

    @property
    def image(self) -> Tensor:
        """(M, d) unit-length prototypes."""
        return self.unit[self._count + 1 :]

    def set_text(self, text: Tensor) -> None:
        """Take other (C, d) class weights."""
        self._set(slice(0, self._count), text)

    def set_prototype(self, place: int, prototype: Tensor) -> None:
        """Take another (d,) prototype of the class at a place."""
        row = self._count + 1 + place
        self._set(slice(row, row + 1), prototype[None])

    def _set(self, places: slice, rows: Tensor) -> None:
        lengths = torch.linalg.vector_norm(rows, dim=1).clamp_(min=_TINY)
        self.start[places] = rows
        self.lengths[places] = lengths
        torch.div(rows, lengths[:, None], out=self.unit[places])
