"""A probe for each session: logistic regression on frozen image embeddings, fixed when the session is over.

What every incremental method with a frozen tower has to beat, since it forgets nothing either. The regression is that
of Radford et al., arXiv 2103.00020, appendix A.3: L-BFGS, the strength of L2 chosen on held-back images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from vlprompt.backbones import Backbone
from vlprompt.core.errors import DataError
from vlprompt.core.seeding import numpy_rng
from vlprompt.learners import LEARNERS
from vlprompt.learners._regression import regress
from vlprompt.learners._sessions import SessionLearner
from vlprompt.learners.base import DEFAULT_TEMPLATES
from vlprompt.metrics.classification import compute

__all__ = ["SessionProbe"]

_STRENGTHS = tuple(range(-2, 6))  # log10 of C
_PLAIN = 0  # log10 of C where no image can be held back to choose it
_HELD_BACK = 4  # one of so many images, where there are no validation images


class _Probe(nn.Module):
    """The regression of one session: (C_t, d) and (C_t,)."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(classes, width))
        self.bias = nn.Parameter(torch.zeros(classes))


@LEARNERS.register(
    "session_probe",
    summary="incremental: logistic regression on image embeddings, one per session",
    paper="2103.00020",
)
class SessionProbe(SessionLearner):
    """Unit-length embeddings, and in each session one regression over its classes, or one per class for several labels.

    Args:
        backbone: See :class:`Learner`.
        classnames: See :class:`Learner`.
        templates: See :class:`Learner`; not used.
        max_iter: L-BFGS iterations.
        sessions: Classes by session, see :class:`SessionLearner`.
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
        sessions: Sequence[Sequence[str]] | None = None,
    ) -> None:
        super().__init__(backbone, classnames, templates, sessions)
        self.max_iter = max_iter
        self.probes = nn.ModuleList([_Probe(len(names), backbone.dim) for names in self.sessions])
        self.freeze_earlier(list(self.probes))
        self.places = [place for place in self.session_places() if place is not None]

    def class_weights(self) -> Tensor:
        """See :meth:`Learner.class_weights`: (C, d + 1), the biases last; not of unit length."""
        rows = [torch.cat([self._probe(s).weight[c], self._probe(s).bias[c : c + 1]]) for s, c in self.places]
        return torch.stack(rows)

    def logits(self, embeddings: Tensor) -> Tensor:
        """Return (B, C) logits of (B, d) embeddings, of each class by the probe of its session."""
        weights = self._weights()
        return nn.functional.normalize(embeddings, dim=-1) @ weights[:, :-1].T + weights[:, -1]

    def solve(
        self,
        train: tuple[Tensor, Tensor],
        val: tuple[Tensor, Tensor] | None,
        seed: int = 1,
        views: int = 1,
    ) -> dict[str, Any]:
        """See :meth:`LearnerHooks.solve`; returns the chosen C and what it reached on held-back images, or None.

        Raises:
            DataError: If the training images show fewer than two classes.
        """
        features = nn.functional.normalize(train[0], dim=-1).cpu().double()
        truth = train[1].cpu()
        if truth.ndim == 1 and len(truth.unique()) < 2:
            raise DataError("session_probe needs training images of at least two classes.")

        kept, held = _parts(truth, views, seed)
        if val is not None and len(val[1]):
            kept = np.arange(len(truth))
            held_features = nn.functional.normalize(val[0], dim=-1).cpu().double()
            held_truth = val[1].cpu()
        else:
            held_features, held_truth = features[held], truth[held]

        scores = {}
        for strength in _STRENGTHS if len(held_truth) else ():
            weight, bias = self._regress(features[kept], truth[kept], strength)
            scores[strength] = _score(held_features @ weight.T + bias, held_truth)

        best = max(scores, key=lambda strength: (scores[strength], -abs(strength)), default=_PLAIN)
        weight, bias = self._regress(features, truth, best)
        newest = self._probe(len(self.sessions) - 1)
        with torch.no_grad():
            newest.weight.copy_(weight)
            newest.bias.copy_(bias)
        self._cached_weights = None
        return {"C": 10.0**best, "val_score": scores.get(best)}

    def _probe(self, session: int) -> _Probe:
        probe = self.probes[session]
        assert isinstance(probe, _Probe)
        return probe

    def _regress(self, features: Tensor, truth: Tensor, strength: int) -> tuple[Tensor, Tensor]:
        """Return (C, d) weights and (C,) biases; a class without an image has a bias that never wins."""
        classes = len(self.sessions[-1])
        weight = torch.zeros(classes, features.shape[1], dtype=torch.float64)
        bias = torch.full((classes,), -1e4, dtype=torch.float64)

        if truth.ndim == 1:
            solution = regress(features, truth, strength, self.max_iter)
            weight[solution.classes] = solution.weight
            bias[solution.classes] = solution.bias
            return weight, bias

        for c in range(classes):
            known = truth[:, c] >= 0
            if len(truth[known, c].unique()) == 2:
                solution = regress(features[known], truth[known, c], strength, self.max_iter)
                weight[c] = 2 * solution.weight[1]  # two classes come as opposite halves
                bias[c] = 2 * solution.bias[1]
        return weight, bias


def _parts(truth: Tensor, views: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return which samples to try on and which to choose on; the views of an image stay together.

    Of several labels aside, every class keeps an image to try on, so of one image per class none is held back.
    """
    images = len(truth) // views
    order = numpy_rng(seed, "held-back images").permutation(images)
    cut = max(1, images // _HELD_BACK)
    held, kept = list(order[:cut]), list(order[cut:])

    if truth.ndim == 1:
        tried = set(truth[kept].tolist())
        for image in tuple(held):
            if int(truth[image]) not in tried:
                tried.add(int(truth[image]))
                held.remove(image)
                kept.append(image)

    def with_views(chosen: list[int]) -> np.ndarray:
        return np.concatenate([np.sort(np.array(chosen, dtype=int)) + view * images for view in range(views)])

    return with_views(kept), with_views(held)


def _score(logits: Tensor, truth: Tensor) -> float:
    """Return mean average precision of several labels, accuracy of single ones; 0 where nothing can be said."""
    if truth.ndim == 2 and not bool((truth > 0).any()):
        return 0.0
    metric = "map" if truth.ndim == 2 else "accuracy"
    return compute(logits, truth, [metric])[metric]
