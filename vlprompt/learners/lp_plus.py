"""LP++: a linear probe whose class vectors blend image and text features, solved with step sizes from the data.

Paper: Huang et al., "LP++: A Surprisingly Strong Linear Probe for Few-Shot CLIP", CVPR 2024, arXiv 2404.02285,
    section 3.

Where this differs from the published code: that code never clears the gradient of alpha, so that each update uses the
sum of all gradients since the first step (``accumulate``), and has a bias with a random start that the paper's model
lacks (``bias``; it starts at zero here). It computes in float16 and counts classes as samples per shot; here sums are
float32, and classes may have any number of samples. Class vectors start at sums of features as in the code; where there
are several views, at sums over images of their means, so that the start does not grow with the views.
"""

from __future__ import annotations

import logging
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

__all__ = ["LinearProbePlus", "class_sums", "step_sizes"]

log = logging.getLogger(__name__)

_SCALE = 250.0  # of the first alpha: the published code's, for all data sets


@LEARNERS.register(
    "lp_plus", summary="LP++: a linear probe that blends image and text vectors", paper="2404.02285"
)
class LinearProbePlus(Learner):
    """Logits f^T (w_c + alpha_c t_c) for unit-length f and zero-shot weights t, without a temperature.

    w starts at the sums of the features of each class, every alpha_c at 250 times the mean over classes of the mean
    <f, t_c> over the class's features. The cross-entropy of all N training features is descended with momentum at rates
    that bound its curvature: 4 N / lambda_max(F^T F) for w, and N / (4 max_c sum_i <f_i, t_c>^2) for alpha, which moves
    in every tenth step. Validation data choose the step, of equally good ones the last; without any it is the last
    step, with a warning.

    A class without samples starts at w = 0 and is pushed down like every class that is never right.

    Args:
        backbone: See :class:`Learner`.
        classnames: See :class:`Learner`.
        templates: Averaged into t.
        steps: Steps over all samples.
        momentum: Of the steps on w.
        alpha_every: Steps between those on alpha; 0 never moves it.
        accumulate: Whether a step on alpha follows the sum of all gradients so far, as in the published code, or the
            present one, as in the paper.
        bias: Whether each class learns a number as well, as in the published code.
    """

    class_bound = True
    solves = True

    def __init__(
        self,
        backbone: Backbone,
        classnames: Sequence[str],
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        *,
        steps: Annotated[int, Field(ge=1)] = 300,
        momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9,
        alpha_every: Annotated[int, Field(ge=0)] = 10,
        accumulate: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__(backbone, classnames, templates)
        self.steps = steps
        self.momentum = momentum
        self.alpha_every = alpha_every
        self.accumulate = accumulate

        texts = backbone.class_weights(self.classnames, self.templates)
        self.register_buffer("texts", texts, persistent=False)

        count = len(self.classnames)
        self.weight = nn.Parameter(torch.zeros(count, backbone.dim))
        self.alpha = nn.Parameter(torch.full((count,), backbone.logit_scale))  # unsolved, it is zero-shot
        self.bias = nn.Parameter(torch.zeros(count)) if bias else None

    def class_embeddings(self) -> Tensor:
        """See :meth:`Learner.class_embeddings`; w_c + alpha_c t_c, whose length counts in the logits."""
        return self.weight + self.alpha[:, None] * self.get_buffer("texts")

    def logits(self, embeddings: Tensor) -> Tensor:
        """Return (B, C) logits of (B, d) image embeddings."""
        logits = F.normalize(embeddings, dim=-1) @ self.class_embeddings().T
        return logits if self.bias is None else logits + self.bias

    @torch.no_grad()
    def solve(
        self,
        train: tuple[Tensor, Tensor],
        val: tuple[Tensor, Tensor] | None,
        seed: int = 1,
        views: int = 1,
    ) -> dict[str, Any]:
        """See :meth:`LearnerHooks.solve`; returns the step that was chosen and its validation accuracy."""
        features = F.normalize(train[0].to(self.weight), dim=-1)
        labels = train[1].to(features.device).long()
        problem = _Problem(features, labels, self.get_buffer("texts"))

        self.weight.copy_(class_sums(features, labels, len(self.classnames)) / views)
        self.alpha.fill_(problem.first_alpha())
        if self.bias is not None:
            self.bias.zero_()

        if val is None or not len(val[1]):
            log.warning(
                "lp_plus: there are no validation data, so the last of %d steps is taken.", self.steps
            )
            self._descend(problem)
            return {"step": self.steps}

        samples = F.normalize(val[0].to(features), dim=-1)
        return self._descend(problem, (samples, val[1].to(labels)))

    def figures(self) -> dict[str, float]:
        """Return the mean weight of the texts."""
        return {"alpha": float(self.alpha.detach().mean())}

    def _descend(self, problem: _Problem, val: tuple[Tensor, Tensor] | None = None) -> dict[str, Any]:
        """Take all steps; with validation data, leave the best one's values."""
        rate, alpha_rate = step_sizes(problem.features, problem.texts)
        similarities = problem.features @ problem.texts.T  # (N, C)
        velocity = torch.zeros_like(self.weight)
        bias_velocity = torch.zeros_like(self.alpha)
        alpha_gradient = torch.zeros_like(self.alpha)
        best: dict[str, Tensor] = {}
        chosen = {"step": 0, "val_accuracy": -1.0}

        for step in range(1, self.steps + 1):
            errors = problem.errors(self.logits(problem.features))

            alpha_step = (errors * similarities).sum(0)
            alpha_gradient = alpha_gradient + alpha_step if self.accumulate else alpha_step

            velocity = self.momentum * velocity + errors.T @ problem.features
            self.weight.sub_(rate * velocity)
            if self.bias is not None:
                bias_velocity = self.momentum * bias_velocity + errors.sum(0)
                self.bias.sub_(rate * bias_velocity)
            if self.alpha_every and step % self.alpha_every == 0:
                self.alpha.sub_(alpha_rate * alpha_gradient)

            if val is not None:
                accuracy = float((self.logits(val[0]).argmax(-1) == val[1]).double().mean())
                if accuracy >= chosen["val_accuracy"]:
                    chosen = {"step": step, "val_accuracy": accuracy}
                    best = {name: tensor.clone() for name, tensor in self.trainable_state().items()}

        if best:
            self.load_trainable_state(best)
        return chosen


@dataclass(frozen=True)
class _Problem:
    """The samples that are descended on.

    Attributes:
        features: (N, d), unit length.
        labels: (N,).
        texts: (C, d), unit length.
    """

    features: Tensor
    labels: Tensor
    texts: Tensor

    def errors(self, logits: Tensor) -> Tensor:
        """Return (N, C) gradients of the mean cross-entropy by the logits."""
        errors = logits.softmax(-1)
        errors[torch.arange(len(errors)), self.labels] -= 1
        return errors / len(errors)

    def first_alpha(self) -> float:
        """Return 250 times the mean over classes with samples of their mean cosine to their own text."""
        cosines = (self.features * self.texts[self.labels]).sum(-1)
        counts = torch.bincount(self.labels, minlength=len(self.texts))
        sums = torch.zeros_like(self.texts[:, 0]).index_add(0, self.labels, cosines)
        return _SCALE * float((sums[counts > 0] / counts[counts > 0]).mean())


def class_sums(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return (C, d) sums of the (N, d) features of each class."""
    return features.new_zeros(classes, features.shape[1]).index_add(0, labels, features)


def step_sizes(features: Tensor, texts: Tensor) -> tuple[float, float]:
    """Return the rates of w and of alpha, see :class:`LinearProbePlus`.

    Args:
        features: (N, d), unit length.
        texts: (C, d), unit length.
    """
    count, dim = features.shape
    gram = features @ features.T if count < dim else features.T @ features  # the same largest eigenvalue
    largest = float(torch.linalg.eigvalsh(gram.double())[-1])
    steepest = float((features @ texts.T).square().sum(0).max())
    return 4 * count / largest, count / (4 * steepest)
