"""Linear probe: logistic regression on frozen image embeddings.

Paper: Radford et al., arXiv 2103.00020, appendix A.3 (the protocol: L-BFGS, the L2 strength searched on
    validation).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from vlprompt.backbones import Backbone
from vlprompt.core.errors import DataError
from vlprompt.learners import LEARNERS
from vlprompt.learners._regression import Regression, regress
from vlprompt.learners.base import DEFAULT_TEMPLATES, Learner

__all__ = ["LinearProbe"]

log = logging.getLogger(__name__)


@LEARNERS.register("linear_probe", summary="logistic regression on image embeddings", paper="2103.00020")
class LinearProbe(Learner):
    """A linear classifier on un-normalised embeddings, solved in closed loop by L-BFGS instead of stepped.

    The inverse strength C is the best of 1e-6 .. 1e6 in steps of 100 on validation, then refined by bisection
    in log10; without validation data C = 1 is taken (never chosen on what is reported).

    Args:
        backbone: See :class:`Learner`.
        classnames: See :class:`Learner`.
        templates: See :class:`Learner`; not used.
        max_iter: L-BFGS iterations.
        bisections: Refinement steps around the best coarse value.
    """

    class_bound = True
    solves = True

    def __init__(
        self,
        backbone: Backbone,
        classnames: Sequence[str],
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        *,
        max_iter: Annotated[int, Field(ge=1)] = 1000,
        bisections: Annotated[int, Field(ge=0, le=16)] = 8,
    ) -> None:
        super().__init__(backbone, classnames, templates)
        self.max_iter = max_iter
        self.bisections = bisections
        self.weight = nn.Parameter(torch.zeros(len(self.classnames), backbone.dim))
        self.bias = nn.Parameter(torch.zeros(len(self.classnames)))

    def logits(self, embeddings: Tensor) -> Tensor:
        """Return (B, C) logits of (B, d) embeddings."""
        return embeddings @ self.weight.T + self.bias

    def solve(
        self,
        train: tuple[Tensor, Tensor],
        val: tuple[Tensor, Tensor] | None,
        seed: int = 1,
        views: int = 1,
    ) -> dict[str, Any]:
        """See :meth:`LearnerHooks.solve`; returns the chosen C and its validation accuracy.

        Raises:
            DataError: If the training samples show fewer than two classes.
        """
        features, labels = (tensor.cpu() for tensor in train)
        if len(labels.unique()) < 2:
            raise DataError("linear_probe needs training samples of at least two classes.")

        strength = 0.0
        score = None
        if val is not None and len(val[1]):
            strength, score = self._search((features, labels), (val[0].cpu(), val[1].cpu()))
        else:
            log.warning("linear_probe: there are no validation data, C stays 1.")

        self._copy_solution(regress(features, labels, strength, self.max_iter))
        return {"C": 10.0**strength, "val_accuracy": score}

    def _search(self, train: tuple[Tensor, Tensor], val: tuple[Tensor, Tensor]) -> tuple[float, float]:
        """Return log10 of the best C and its validation accuracy; of equally good ones the nearest to C = 1."""
        scores: dict[float, float] = {}

        def score(strength: float) -> float:
            if strength not in scores:
                right = regress(*train, strength, self.max_iter).predict(val[0]) == val[1]
                scores[strength] = float(right.double().mean())
            return scores[strength]

        best = max(range(-6, 7, 2), key=lambda strength: (score(float(strength)), -abs(strength)))
        low = best - 2.0
        high = best + 2.0
        for _ in range(self.bisections):
            middle = (low + high) / 2
            if score((low + middle) / 2) >= score((middle + high) / 2):
                high = middle
            else:
                low = middle

        chosen = max(scores, key=lambda strength: (scores[strength], -abs(strength)))
        return chosen, scores[chosen]

    def _copy_solution(self, solution: Regression) -> None:
        """Copy the solution; a class without samples gets a bias that never wins."""
        with torch.no_grad():
            self.weight.zero_()
            self.bias.fill_(-1e4)
            self.weight[solution.classes] = solution.weight.float().to(self.weight.device)
            self.bias[solution.classes] = solution.bias.float().to(self.bias.device)
        self._cached_weights = None
