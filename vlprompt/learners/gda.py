"""GDA: Gaussian classes with one common covariance, a linear classifier in closed form that is added to zero-shot.

Paper: Wang et al., "A Hard-to-Beat Baseline for Training-free CLIP-based Adaptation", ICLR 2024, arXiv 2402.04087,
    section 3.

Where this differs from the published code: alpha is never chosen on test data (the code does so for ImageNet). Without
validation data it is chosen on the training images, each scored by a classifier that never saw it. Classes without
samples and a covariance of zero are defined. The code's second estimator, for names without images, is left out.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vlprompt.backbones import Backbone
from vlprompt.learners import LEARNERS
from vlprompt.learners.base import DEFAULT_TEMPLATES, Learner

__all__ = ["GaussianClassifier", "GaussianDiscriminant", "gaussian_classifier", "left_out_scores"]

log = logging.getLogger(__name__)

_NOTHING = 1e-12  # a trace per sample below this is rounding: unit-length features have moments near 1


@LEARNERS.register("gda", summary="Gaussian classes in closed form, added to zero-shot", paper="2402.04087")
class GaussianDiscriminant(Learner):
    """Logits tau <f, w0_c> + alpha (f^T A_c + b_c) for unit-length features f.

    A_c = P mu_c and b_c = -log C - mu_c^T P mu_c / 2, with mu_c the mean feature of class c over all views (not
    normalised again), S the scatter of the features around the means of their classes, N their number, and the shrunk
    precision P = d (S + tr(S) / (N - 1) I)^-1. Up to a factor and a constant this is linear discriminant analysis with
    shrinkage d / (N - 1 + d) and uniform priors.

    alpha is the first best of ``alphas`` on validation data. Without any it is the first best for images left out:
    every training image is scored by the classifier of all others (all its views leave), which needs two images of a
    class. What chose alpha stands in the run's history: ``val_accuracy`` or ``leave_one_out_accuracy``, or neither.

    A class without samples keeps its zero-shot score and gets the mean A and b of the others. If no feature differs
    from its class's mean (one image per class, one view), A = b = 0: zero-shot, with a warning.

    Args:
        backbone: See :class:`Learner`.
        classnames: See :class:`Learner`.
        templates: Averaged into the zero-shot weights w0.
        alpha: Weight of the Gaussian part where nothing chooses it.
        alphas: Values to choose from, in the order of preference between equals; empty keeps ``alpha``.
        leave_one_out: Whether images left out choose alpha where there are no validation data.
    """

    class_bound = True
    solves = True

    def __init__(
        self,
        backbone: Backbone,
        classnames: Sequence[str],
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        *,
        alpha: Annotated[float, Field(ge=0)] = 1.0,
        alphas: Sequence[Annotated[float, Field(ge=0)]] = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 100.0),
        leave_one_out: bool = True,
    ) -> None:
        super().__init__(backbone, classnames, templates)
        self.start = alpha
        self.alphas = list(alphas)
        self.leave_one_out = leave_one_out

        zero_shot = backbone.class_weights(self.classnames, self.templates)
        self.register_buffer("zero_shot", zero_shot, persistent=False)

        self.weight = nn.Parameter(torch.zeros(len(self.classnames), backbone.dim))  # A
        self.bias = nn.Parameter(torch.zeros(len(self.classnames)))  # b
        self.alpha = nn.Parameter(torch.tensor(alpha))

    def class_embeddings(self) -> Tensor:
        """Return the zero-shot weights, the part that is not Gaussian."""
        return self.get_buffer("zero_shot")

    def logits(self, embeddings: Tensor) -> Tensor:
        """Return (B, C) logits of (B, d) image embeddings."""
        features = F.normalize(embeddings, dim=-1)
        return self._zero_shot_logits(features) + self.alpha * (features @ self.weight.T + self.bias)

    @torch.no_grad()
    def solve(
        self,
        train: tuple[Tensor, Tensor],
        val: tuple[Tensor, Tensor] | None,
        seed: int = 1,
        views: int = 1,
    ) -> dict[str, Any]:
        """See :meth:`LearnerHooks.solve`; returns alpha and the accuracy it was chosen by."""
        features = F.normalize(train[0].to(self.weight.device).double(), dim=-1)
        labels = train[1].to(features.device).long()

        solution = gaussian_classifier(features, labels, len(self.classnames))
        if solution is None:
            log.warning(
                "gda: no training sample differs from the mean of its class, so there is no covariance and the result "
                "is zero-shot. Give it more shots, or several augmented views of an image (data.views)."
            )
            solution = GaussianClassifier.zero(features, len(self.classnames))

        self.weight.copy_(solution.weight)
        self.bias.copy_(solution.bias)
        self.alpha.fill_(self.start)
        return {"alpha": self.start, **self._choose_alpha(features, labels, views, val)}

    def figures(self) -> dict[str, float]:
        """Return alpha."""
        return {"alpha": float(self.alpha.detach())}

    def _zero_shot_logits(self, features: Tensor) -> Tensor:
        return self.backbone.logit_scale * features @ self._weights().to(features.dtype).T

    def _choose_alpha(
        self, features: Tensor, labels: Tensor, views: int, val: tuple[Tensor, Tensor] | None
    ) -> dict[str, float]:
        """Set alpha to the first best and return it with its accuracy; empty if nothing chooses."""
        if not self.alphas:
            return {}

        if val is not None and len(val[1]):
            measure = "val_accuracy"
            samples = F.normalize(val[0].to(features), dim=-1)
            targets = val[1].to(labels)
            scores = samples @ self.weight.to(samples.dtype).T + self.bias

        elif self.leave_one_out:
            measure = "leave_one_out_accuracy"
            rows, scores = left_out_scores(features, labels, len(self.classnames), views)
            samples = features[rows]
            targets = labels[rows]

        else:
            log.warning("gda: there are no validation data, alpha stays %g.", self.start)
            return {}

        if not len(targets):
            log.warning(
                "gda: there are no validation data and no class with two training images, alpha stays %g.",
                self.start,
            )
            return {}

        zero_shot = self._zero_shot_logits(samples)
        accuracies = [
            float(((zero_shot + alpha * scores).argmax(-1) == targets).double().mean())
            for alpha in self.alphas
        ]
        best = max(accuracies)
        alpha = self.alphas[accuracies.index(best)]
        self.alpha.fill_(alpha)
        return {"alpha": alpha, measure: best}


@dataclass(frozen=True)
class GaussianClassifier:
    """A linear classifier f^T A_c + b_c.

    Attributes:
        weight: (C, d), A.
        bias: (C,), b.
    """

    weight: Tensor
    bias: Tensor

    @classmethod
    def zero(cls, features: Tensor, classes: int) -> GaussianClassifier:
        """Return the classifier that says nothing about (n, d) features."""
        return cls(features.new_zeros(classes, features.shape[1]), features.new_zeros(classes))


def gaussian_classifier(features: Tensor, labels: Tensor, classes: int) -> GaussianClassifier | None:
    """Solve for A and b, see :class:`GaussianDiscriminant`.

    Args:
        features: (N, d) unit-length features of all views, float64.
        labels: (N,) class numbers.
        classes: C; some may have no sample.

    Returns:
        The classifier; None if no feature differs from its class's mean.
    """
    count, dim = features.shape
    sums, sizes = _class_sums(features, labels, classes)
    present = sizes > 0
    means = sums[present] / sizes[present, None]

    residuals = features - sums[labels] / sizes[labels, None]
    scatter = residuals.T @ residuals
    trace = float(scatter.trace())
    if count < 2 or trace <= _NOTHING * count:
        return None

    shrunk = scatter + trace / (count - 1) * torch.eye(dim).to(scatter)
    precise = dim * torch.cholesky_solve(means.T, torch.linalg.cholesky(shrunk)).T  # P mu
    offset = -math.log(classes) - (means * precise).sum(-1) / 2

    weight = precise.mean(0).repeat(classes, 1)
    bias = offset.mean().repeat(classes)
    weight[present] = precise
    bias[present] = offset
    return GaussianClassifier(weight, bias)


def left_out_scores(features: Tensor, labels: Tensor, classes: int, views: int) -> tuple[Tensor, Tensor]:
    """Return f^T A + b of every image whose class has another one, by the classifier that never saw the image.

    All views of an image leave together. In the eigenvectors of the scatter the shrunk scatter is diagonal, and
    leaving V views out takes a matrix of rank V away, so that each image costs V C d operations in place of d^3.

    Args:
        features: (V n, d) unit-length features, view by view, float64.
        labels: (V n,) class numbers.
        classes: C.
        views: V.

    Returns:
        (m,) rows of ``features`` that could be left out, and their (m, C) scores.
    """
    sums, sizes = _class_sums(features, labels, classes)
    residuals = features - sums[labels] / sizes[labels, None]
    spectrum, basis = torch.linalg.eigh(residuals.T @ residuals)
    rotated = features @ basis
    space = _Rotated(rotated, labels, sums @ basis, sizes, spectrum.clamp(min=0))

    rows = []
    scores = []
    images = len(labels) // views
    for image in range(images):
        members = torch.arange(image, len(labels), images, device=labels.device)
        part = space.scores_without(members)
        if part is not None:
            rows.append(members)
            scores.append(part)

    if not rows:
        return labels.new_zeros(0), features.new_zeros(0, classes)
    return torch.cat(rows), torch.cat(scores)


@dataclass(frozen=True)
class _Rotated:
    """Training features in the eigenvectors of their scatter.

    Attributes:
        features: (N, d).
        labels: (N,).
        sums: (C, d) sums of the features of each class.
        sizes: (C,) numbers of features.
        spectrum: (d,) eigenvalues of the scatter.
    """

    features: Tensor
    labels: Tensor
    sums: Tensor
    sizes: Tensor
    spectrum: Tensor

    def scores_without(self, members: Tensor) -> Tensor | None:
        """Return (V, C) scores of the V rows of an image by the classifier of all others; None if there is none."""
        left_out = self.features[members]
        label = self.labels[members[0]]
        size = self.sizes[label]
        rest = size - len(members)
        count = len(self.features) - len(members)
        if rest < 1 or count < 2:
            return None

        # The scatter loses that of the rows around their mean, and what moving the class's mean takes with it.
        row_mean = left_out.mean(0)
        rest_mean = (self.sums[label] - left_out.sum(0)) / rest
        step = (rest * len(members) / size).sqrt() * (rest_mean - row_mean)
        lost = torch.cat([left_out - row_mean, step[None]])  # (V + 1, d): S' = S - lost^T lost

        trace = float(self.spectrum.sum() - lost.square().sum())
        if trace <= _NOTHING * count:
            return None

        diagonal = 1 / (self.spectrum + trace / (count - 1))
        weighted = lost * diagonal
        core = torch.linalg.inv(torch.eye(len(lost)).to(lost) - weighted @ lost.T)  # Woodbury

        means, present = self._means_with(label, rest_mean)
        dim = len(self.spectrum)
        precise = left_out * diagonal + left_out @ weighted.T @ core @ weighted
        products = means @ weighted.T
        squares = (means.square() * diagonal).sum(-1) + (products @ core * products).sum(-1)

        scores = dim * (precise @ means.T - squares / 2) - math.log(len(self.sums))
        return _with_missing(scores, present)

    def _means_with(self, label: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
        """Return the means of the classes that have samples, one of them replaced, and which classes those are."""
        present = self.sizes > 0
        means = self.sums / self.sizes.clamp(min=1)[:, None]
        means[label] = mean
        return means[present], present


def _with_missing(scores: Tensor, present: Tensor) -> Tensor:
    """Return (V, C) scores out of those of the present classes; the others get their mean."""
    whole = scores.mean(-1, keepdim=True).repeat(1, len(present))
    whole[:, present] = scores
    return whole


def _class_sums(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Return (C, d) sums of the features of each class and their (C,) numbers."""
    sums = features.new_zeros(classes, features.shape[1]).index_add(0, labels, features)
    return sums, torch.bincount(labels, minlength=classes).to(features.dtype)
