"""OGA: Gaussian classes with one covariance, from a cache of confident images, beside the classifier.

Paper: Fuchs et al., "Online Gaussian Test-Time Adaptation of Vision-Language Models", arXiv 2501.04352, section 3.

The published code divides the sum of a class's cached features by all of its slots, also the empty ones;
``mean="slots"`` follows it, by default they are averages. Its cache is float16, here everything is float32.

The covariance is shrunk by its own trace, so each cached image moves its inverse by a few terms of rank one and by a
multiple of the identity. The terms are followed exactly (Sherman and Morrison, 1950); the multiple is small beside
what is there already, and its powers beyond the third are below float32. Where it is not, and after a number of images
that keeps rounding from adding up, the inverse is computed anew from the cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from vlprompt.adaptation import ADAPTERS
from vlprompt.adaptation._features import Share, StreamAdapter, Views, confident_mean
from vlprompt.adaptation.selection import entropies
from vlprompt.adaptation.views import Augment, ViewPlan
from vlprompt.learners import Learner

__all__ = ["OnlineGaussian"]

_ENOUGH_FOR_MEAN = 2  # cached images of a class
_ENOUGH_FOR_COVARIANCE = 3
_SHRUNK_BELOW = 4  # images per dimension
_ANEW = 128  # images after which the inverse is computed from the cache
_FAR = 1 / 32  # of the multiple of the identity, above which a power series of four terms is no float32
_LEAST_PIVOT = 0.05  # below which a term of rank one takes away nearly all that is there
_LEAST_TRACE = 1e-12
_LEAST_FOLLOWED = 1e-6  # a multiple of the identity beside which rounding of unit vectors is small
_NOTHING = 1e-12  # a share of the trace
_NOT_YET = -1  # the age of an inverse before there is a covariance


@ADAPTERS.register(
    "oga",
    summary="Gaussian classes from a cache of confident images; online, no gradients",
    paper="2501.04352",
)
class OnlineGaussian(StreamAdapter):
    """Probabilities proportional to p_c exp(tau g_c), g the Gaussian log-likelihood and p the classifier's opinion.

    An image enters the cache under the class that the classifier gives it, in the place of the least certain one.

    Args:
        learner: See :class:`FeatureAdapter`.
        slots: Cached images of each class.
        tau: Weight of the likelihood.
        mean: ``"counts"`` averages the cached images; ``"slots"`` divides their sum by ``slots``.
        views: V, including the image itself.
        augment: See :class:`ViewPlan`.
        seed: Of the views.
        share: Share of the views that represent an image, the most confident ones.
    """

    def __init__(
        self,
        learner: Learner,
        *,
        slots: Annotated[int, Field(ge=1)] = 8,
        tau: Annotated[float, Field(ge=0)] = 0.05,
        mean: Literal["counts", "slots"] = "counts",
        views: Views = 1,
        augment: Augment = "crop_flip",
        seed: int = 0,
        share: Share = 0.1,
    ) -> None:
        super().__init__(learner, ViewPlan(views, augment, seed), share)
        self.slots = slots
        self.tau = tau
        self.mean: Literal["counts", "slots"] = mean
        self.reset()

    def empty(self) -> dict[str, Tensor]:
        """See :meth:`StreamAdapter.empty`."""
        classes, width = self.weights.shape
        number = self.weights.new_zeros(())
        return {
            "keys": self.weights.new_zeros(classes, self.slots, width),
            # An image that is as uncertain as can be is worth nothing.
            "entropy": self.weights.new_full((classes, self.slots), math.log(classes)),
            "filled": torch.zeros(classes, self.slots, dtype=torch.bool, device=self.weights.device),
            "means": self.weights.clone(),
            # Of what cached images differ from the means of their classes by: the sum, and the squares around it.
            "residual": self.weights.new_zeros(width),
            "spread": number.clone(),
            # P = (scatter + base I)^-1, the means times P, and times P once more.
            "inverse": torch.eye(width, device=self.weights.device),
            "base": number.clone(),
            "once": self.weights.clone(),
            "twice": self.weights.clone(),
            "age": torch.full((), _NOT_YET),
            # The precision is factor (P^-1 + excess I)^-1; offsets are the part of g that images share.
            "excess": number.clone(),
            "factor": number + width,
            "offsets": -0.5 * width * self.weights.square().sum(1),
        }

    def many(
        self, features: Tensor, logits: Tensor, confident: Tensor
    ) -> Sequence[tuple[Tensor, Tensor | None]]:
        """See :meth:`StreamAdapter.many`."""
        images = F.normalize(confident_mean(features, confident), dim=1)
        opinions = self.scale * images @ self.weights.T
        labels = opinions.argmax(1).tolist()
        uncertainties = entropies(opinions)

        likelihoods = []
        for image, label, uncertainty in zip(images, labels, uncertainties, strict=True):
            self._offer(image, label, uncertainty)
            likelihoods.append(self._likelihoods(image))
        probs = (opinions.log_softmax(1) + self.tau * torch.stack(likelihoods)).softmax(1)
        return [(row, None) for row in probs]

    def class_means(self) -> Tensor:
        """Return (C, d) means; a class with too few images has its class weight."""
        return self.memory["means"]

    def _likelihoods(self, image: Tensor) -> Tensor:
        """Return (C,) Gaussian log-likelihoods of a (d,) image, without what is the same for all classes."""
        memory = self.memory
        excess = float(memory["excess"])
        cosines = torch.mv(memory["once"], image)
        if excess:
            # (P^-1 + x I)^-1 = P - x P^2 + x^2 P^3 - x^3 P^4
            first = torch.mv(memory["inverse"], image)
            second = torch.mv(memory["inverse"], first)
            series = image.sub(first, alpha=excess).add_(second, alpha=excess**2)
            cosines.addmv_(memory["twice"], series, alpha=-excess)
        return torch.add(memory["offsets"], cosines, alpha=float(memory["factor"]))

    def _offer(self, image: Tensor, label: int, uncertainty: Tensor) -> None:
        """Put an image into the cache if it is more certain than another of its class, and fit the Gaussians."""
        memory = self.memory
        entropy = memory["entropy"][label]
        worst = int(entropy.argmax())
        if not bool(uncertainty < entropy[worst]):
            return

        filled = memory["filled"][label]
        old = memory["keys"][label, worst].clone() if bool(filled[worst]) else None
        before = self._cached(label)
        memory["keys"][label, worst] = image
        entropy[worst] = uncertainty
        filled[worst] = True
        after = self._cached(label)
        memory["means"][label] = after.mean

        if int(memory["age"]) == _NOT_YET and after.count < _ENOUGH_FOR_COVARIANCE:
            memory["once"][label] = after.mean
        elif not self._follow(label, before, after, old, image):
            self._fit()
        self._share()

    def _cached(self, label: int) -> _Cached:
        """Return what the cache says about a class."""
        count = int(self.memory["filled"][label].sum())
        total = self.memory["keys"][label].sum(0)
        centre = total / max(count, 1)
        if count < _ENOUGH_FOR_MEAN:
            return _Cached(count, centre, self.weights[label])
        return _Cached(count, centre, centre if self.mean == "counts" else total / self.slots)

    def _follow(self, label: int, before: _Cached, after: _Cached, old: Tensor | None, new: Tensor) -> bool:
        """Move the inverse to where one class has changed; return False where it must be computed anew.

        Args:
            label: The class.
            before: What it was.
            after: What it is.
            old: (d,) the image that left the cache, if one did.
            new: (d,) the image that came.
        """
        memory = self.memory
        total = int(memory["filled"].sum())
        width = len(new)
        shrunk = total <= _SHRUNK_BELOW * width
        age = int(memory["age"])
        if age in (_NOT_YET, _ANEW) or shrunk != (float(memory["base"]) > 0):
            return False

        residual = memory["residual"] + after.residual - before.residual
        terms = [
            *_changes(before, after, old, new),
            (1 / (total if old is not None else total - 1), memory["residual"]),
            (-1 / total, residual),
        ]
        memory["residual"] = residual
        # What comes before what goes: what is inverted stays positive.
        terms.sort(key=lambda term: term[0], reverse=True)
        if not all(self._rank_one(*term) for term in terms):
            return False

        memory["once"][label] = memory["inverse"] @ after.mean
        memory["twice"][label] = memory["inverse"] @ memory["once"][label]
        memory["age"] += 1
        if not shrunk:
            memory["factor"].fill_(total - 1)
            return True
        base = float(memory["base"])
        memory["excess"].fill_(max(float(memory["spread"]) / (total - 1), _LEAST_TRACE) - base)
        return abs(float(memory["excess"])) <= _FAR * base

    def _rank_one(self, weight: float, vector: Tensor) -> bool:
        """Add ``weight`` times v v^T to what is inverted; return False where float32 can't follow."""
        memory = self.memory
        size = weight * float(vector @ vector)
        memory["spread"] += size
        if abs(size) <= _NOTHING * float(memory["spread"]):
            return True

        inverse, once, twice = memory["inverse"], memory["once"], memory["twice"]
        first = torch.mv(inverse, vector)
        pivot = 1 + weight * float(vector @ first)
        if pivot < _LEAST_PIVOT:
            return False
        second = torch.mv(inverse, first)
        by_first = torch.mv(once, vector)
        by_second = torch.mv(once, first)

        # With p = P v and c = weight / pivot, P becomes P - c p p^T, and so P^2 becomes
        # P^2 - c (p (P p)^T + (P p) p^T) + c^2 |p|^2 p p^T.
        factor = weight / pivot
        twice.addr_(by_first, second, alpha=-factor)
        by_second.sub_(by_first, alpha=factor * float(first @ first))
        twice.addr_(by_second, first, alpha=-factor)
        once.addr_(by_first, first, alpha=-factor)
        inverse.addr_(first, first, alpha=-factor)
        return True

    def _fit(self) -> None:
        """Compute everything from the cache; the covariance is shrunk as long as there are few images."""
        memory = self.memory
        means = memory["means"]
        residuals = (memory["keys"] - means[:, None])[memory["filled"]]
        total, width = residuals.shape
        memory["residual"] = residuals.sum(0)
        residuals = residuals - memory["residual"] / total
        memory["spread"] = residuals.square().sum()
        memory["age"].zero_()
        memory["excess"].zero_()

        if total <= _SHRUNK_BELOW * width:
            # Images that are all the same spread nowhere.
            base = max(float(memory["spread"]) / (total - 1), _LEAST_TRACE)
            memory["inverse"] = _inverse(residuals, base)
            memory["base"].fill_(base)
            memory["factor"].fill_(width)
            follows = base > _LEAST_FOLLOWED
        else:
            memory["inverse"], follows = _pseudo_inverse(residuals)
            memory["base"].zero_()
            memory["factor"].fill_(total - 1)
        if not follows:
            memory["age"].fill_(_ANEW)
        memory["once"] = means @ memory["inverse"]
        memory["twice"] = memory["once"] @ memory["inverse"]

    def _share(self) -> None:
        """Compute the part of the log-likelihoods that images share, -factor / 2 mean^T precision mean."""
        memory = self.memory
        once, twice = memory["once"], memory["twice"]
        excess = float(memory["excess"])
        squares = torch.linalg.vecdot(once, memory["means"])
        if excess:
            # The series of _likelihoods.
            squares.sub_(torch.linalg.vecdot(once, once), alpha=excess)
            squares.add_(torch.linalg.vecdot(once, twice), alpha=excess**2)
            squares.sub_(torch.linalg.vecdot(twice, twice), alpha=excess**3)
        memory["offsets"] = squares.mul_(-0.5 * float(memory["factor"]))


@dataclass(frozen=True)
class _Cached:
    """What the cache says about a class: its number of images, their (d,) average, the (d,) mean of the Gaussian."""

    count: int
    centre: Tensor
    mean: Tensor

    @property
    def residual(self) -> Tensor:
        """(d,) sum of what the images differ from the mean by."""
        return self.count * (self.centre - self.mean)


def _changes(before: _Cached, after: _Cached, old: Tensor | None, new: Tensor) -> list[tuple[float, Tensor]]:
    """Return weights and (d,) vectors, weight v v^T the terms that one image adds to the scatter of its class.

    The scatter around a mean is that around the average, and count times the square of the distance of the two.
    """
    terms = []
    count = before.count
    centre = before.centre
    if old is not None:
        count -= 1
        if count:
            terms.append((-before.count / count, old - centre))
            centre = centre + (centre - old) / count
    if count:
        terms.append((count / after.count, new - centre))
    terms.append((-float(before.count), before.centre - before.mean))
    terms.append((float(after.count), after.centre - after.mean))
    return terms


def _inverse(residuals: Tensor, shift: float) -> Tensor:
    """Return the (d, d) inverse of R^T R + shift I of (n, d) rows R."""
    total, width = residuals.shape
    if 2 * total > width:
        scatter = residuals.T @ residuals
        scatter.diagonal().add_(shift)
        return torch.cholesky_inverse(torch.linalg.cholesky(scatter))

    # Few images: (I - R^T (R R^T + shift I)^-1 R) / shift.
    gram = residuals @ residuals.T
    gram.diagonal().add_(shift)
    half = torch.linalg.solve_triangular(torch.linalg.cholesky(gram), residuals, upper=False)
    inverse = (half.T @ half).neg_()
    inverse.diagonal().add_(1)
    return inverse.div_(shift)


def _pseudo_inverse(residuals: Tensor) -> tuple[Tensor, bool]:
    """Return the (d, d) pseudo-inverse of R^T R, and whether it is an inverse that terms of rank one may follow."""
    values, vectors = torch.linalg.eigh(residuals.T @ residuals)
    least = float(values[-1]) * len(values) * torch.finfo(values.dtype).eps
    inverted = torch.where(values > least, 1 / values, torch.zeros_like(values))
    # As well conditioned as a shrunk covariance is at worst.
    follows = float(values[0]) * _SHRUNK_BELOW * len(values) > float(values[-1])
    return (vectors * inverted) @ vectors.T, follows
