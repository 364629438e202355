"""The core of TransCLIP and StatA: Gaussian classes, a graph of neighbours and the classifier's own opinion, in rounds.

Equations: Zanella et al., "Boosting Vision-Language Models with Transduction", NeurIPS 2024, 2406.01837, section 4;
    Zanella et al., "Realistic Test-Time Adaptation of Vision-Language Models", CVPR 2025, arXiv 2501.03729, section 3.

A distance is expanded, sum_d (f - mu)^2 / v = (f^2) (1/v)^T - 2 f (mu/v)^T + sum mu^2/v, so that nothing larger than
images times classes is in memory.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vlprompt.adaptation._features import FeatureAdapter
from vlprompt.adaptation.base import Adapted, EncodedViews, Granularity
from vlprompt.adaptation.views import ViewPlan
from vlprompt.learners import Learner

__all__ = ["GaussianAdapter", "Gaussians", "assign", "neighbour_graph", "rounds_of", "weighted_squares"]

NEIGHBOURS = 3
_SHARPNESS = 50.0  # what likelihoods are divided by, and neighbours multiplied by
_INNER = 5  # passes over the graph in each round
_LEAST_VARIANCE = 1e-10
_TINY = 1e-12
_TOGETHER = 1024  # rows of the matrix of cosines in memory


class GaussianAdapter(FeatureAdapter):
    """Base of methods that name many images together by Gaussian classes; a method defines :meth:`classes_of`.

    Args:
        learner: See :class:`FeatureAdapter`.
        plan: See there.
        share: See there.
        batch: Images that are named together; None for all of them.
        rounds: How often the Gaussians are fitted.
        trust: Weight of the classifier's opinion.
        smooth: Weight of the graph.
    """

    granularity: Granularity = "dataset"

    def __init__(
        self,
        learner: Learner,
        plan: ViewPlan,
        share: float,
        *,
        batch: int | None,
        rounds: int,
        trust: float,
        smooth: float,
    ) -> None:
        super().__init__(learner, plan, share)
        self.rounds = rounds
        self.trust = trust
        self.smooth = smooth
        if batch is not None:
            self.granularity = "batch"
            self.batch = batch

    @torch.no_grad()
    def adapt(self, views: EncodedViews) -> Adapted:
        """See :meth:`Adapter.adapt`."""
        features, logits, mask = self.one_feature(views)
        probs, means = self.solve(features, logits)
        return Adapted(probs, mask, features @ means.T)

    def solve(self, features: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return (N, C) probabilities and (C, d) class means of (N, d) unit features with (N, C) logits."""
        start, fit = self.classes_of(features, logits)
        probs, classes = rounds_of(
            features, logits, start, fit, rounds=self.rounds, trust=self.trust, smooth=self.smooth
        )
        return probs, classes.means

    @abstractmethod
    def classes_of(self, features: Tensor, logits: Tensor) -> tuple[Gaussians, Callable[[Tensor], Gaussians]]:
        """Return the classes to start from, and what fits them to (N, C) assignments; arguments as :meth:`solve`."""


@dataclass(frozen=True)
class Gaussians:
    """Classes as Gaussians with diagonal covariance.

    Attributes:
        means: (C, d), unit length.
        variances: (C, d), or (1, d) where the classes share them.
        with_determinant: Whether the logarithm of the variances counts; a shared one changes nothing.
    """

    means: Tensor
    variances: Tensor
    with_determinant: bool

    def log_likelihoods(self, features: Tensor) -> Tensor:
        """Return (N, C), up to a constant."""
        inverse = 1 / self.variances.clamp(min=_LEAST_VARIANCE)
        scores = features @ (self.means * inverse).T
        scores -= 0.5 * (self.means.square() * inverse).sum(1)
        if len(inverse) > 1:
            scores.addmm_(features.square(), inverse.T, alpha=-0.5)
        if self.with_determinant:
            scores -= 0.5 * self.variances.clamp(min=_LEAST_VARIANCE).log().sum(1)
        return scores


def neighbour_graph(features: Tensor, count: int = NEIGHBOURS) -> Tensor:
    """Return the (N, N) sparse W + W^T, W_ij the cosine of i and j where j is one of the nearest others of i.

    Args:
        features: (N, d), unit length.
        count: Neighbours of each.
    """
    total = len(features)
    count = min(count, total - 1)
    values = []
    columns = []
    for first in range(0, total, _TOGETHER):
        cosines = features[first : first + _TOGETHER] @ features.T
        rows = torch.arange(len(cosines), device=features.device)
        cosines[rows, first + rows] = -torch.inf  # an image is no neighbour of itself
        best = cosines.topk(count, dim=1)
        values.append(best.values.flatten())
        columns.append(best.indices.flatten())

    weights = torch.cat(values)
    targets = torch.cat(columns)
    sources = torch.arange(total, device=features.device).repeat_interleave(count)
    indices = torch.stack([torch.cat([sources, targets]), torch.cat([targets, sources])])
    graph = torch.sparse_coo_tensor(
        indices, torch.cat([weights, weights]), (total, total), check_invariants=False
    )
    return graph.coalesce()


def assign(
    likelihoods: Tensor, log_prior: Tensor, z: Tensor, graph: Tensor, trust: float, smooth: float
) -> Tensor:
    """Return (N, C) assignments after five passes, each of which uses the one before wholly.

    Args:
        likelihoods: (N, C) logarithms.
        log_prior: (N, C) logarithms of the classifier's probabilities.
        z: (N, C) assignments to begin with.
        graph: See :func:`neighbour_graph`.
        trust: Weight of the prior (the papers' lambda).
        smooth: Weight of the graph.
    """
    fixed = likelihoods / _SHARPNESS
    fixed.add_(log_prior, alpha=trust)
    for _ in range(_INNER):
        logits = torch.sparse.mm(graph, z)
        logits.mul_(smooth / (2 * NEIGHBOURS)).add_(fixed)
        z = logits.softmax(1)
    return z


def weighted_squares(features: Tensor, z: Tensor, means: Tensor) -> Tensor:
    """Return the (C, d) sums over images of z_ic (f_id - mu_cd)^2."""
    sums = z.T @ features.square()
    sums -= 2 * means * (z.T @ features)
    sums += means.square() * z.sum(0)[:, None]
    return sums.clamp(min=0)


def rounds_of(
    features: Tensor,
    logits: Tensor,
    start: Gaussians,
    fit: Callable[[Tensor], Gaussians],
    *,
    rounds: int,
    trust: float,
    smooth: float,
) -> tuple[Tensor, Gaussians]:
    """Assign and fit in turn, and assign once more; return (N, C) assignments and the last Gaussians.

    Args:
        features: (N, d), unit length.
        logits: (N, C) of the classifier.
        start: The Gaussians of the first round.
        fit: Makes Gaussians of assignments.
        rounds: How often they are fitted.
        trust: See :func:`assign`.
        smooth: See :func:`assign`.
    """
    log_prior = logits.log_softmax(1)
    z = log_prior.exp()
    graph = neighbour_graph(features)

    classes = start
    for number in range(rounds + 1):
        if number:
            classes = fit(z)
        z = assign(classes.log_likelihoods(features), log_prior, z, graph, trust, smooth)
    return z, classes


def class_means(features: Tensor, z: Tensor) -> Tensor:
    """Return the (C, d) unit-length weighted means; those of absent classes are 0."""
    return torch.nn.functional.normalize(z.T @ features / z.sum(0).clamp(min=_TINY)[:, None], dim=1)
