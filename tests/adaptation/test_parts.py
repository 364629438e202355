"""Selection, objectives and the methods that need no gradients, against formulas written out and edge cases."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlprompt.adaptation.mta import robust_mode
from vlprompt.adaptation.objectives import dispersion, marginal_entropy
from vlprompt.adaptation.selection import (
    cosine_then_entropy,
    entropies,
    keep_count,
    lowest_entropy,
    parallel_filters,
)
from vlprompt.adaptation.zero import count_votes


def noise(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_marginal_entropy_is_the_entropy_of_the_mean() -> None:
    logits = noise(3, 6, 5)
    mask = torch.tensor([[1, 1, 0, 1, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 1, 0, 0, 0]], dtype=torch.bool)
    for row, used, got in zip(logits, mask, marginal_entropy(logits, mask), strict=True):
        mean = torch.stack([view.exp() / view.exp().sum() for view in row[used]]).mean(0)
        assert float(got) == pytest.approx(float(-(mean * mean.log()).sum()), abs=1e-6)
    assert float(marginal_entropy(logits, mask)[2]) == pytest.approx(float(entropies(logits)[2, 2]), abs=1e-6)
    torch.testing.assert_close(marginal_entropy(logits)[1], marginal_entropy(logits, mask)[1])


def test_marginal_entropy_of_certain_views_is_finite() -> None:
    certain = torch.tensor([[1000.0, 0.0, -1000.0], [1000.0, 0.0, -1000.0]]).requires_grad_()
    value = marginal_entropy(certain)
    value.backward()
    assert float(value.detach()) == 0.0
    assert certain.grad is not None
    assert bool(certain.grad.isfinite().all())


def test_gradient_of_marginal_entropy_is_the_finite_difference() -> None:
    logits = noise(2, 4, 3).double().requires_grad_()
    mask = torch.tensor([[True, False, True, True], [True, True, False, False]])
    assert torch.autograd.gradcheck(lambda z: marginal_entropy(z, mask), (logits,))


def test_dispersion_is_the_mean_distance_from_the_centre() -> None:
    weights = F.normalize(noise(4, 6), dim=-1)
    centre = sum(weights) / 4
    expected = sum(math.sqrt(float((w - centre).square().sum())) for w in weights) / 4
    assert float(dispersion(weights)) == pytest.approx(expected, abs=1e-6)
    assert float(dispersion(weights[:1].expand(4, -1))) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("share", "views", "count"), [(0.1, 64, 6), (0.1, 5, 1), (0.8, 127, 101), (0.3, 102, 30)]
)
def test_counts_of_kept_views(share: float, views: int, count: int) -> None:
    assert keep_count(share, views) == count
    mask = lowest_entropy(noise(2, views, 7), share)
    assert mask.sum(-1).tolist() == [count, count]


def test_the_most_confident_views_are_kept() -> None:
    logits = noise(1, 10, 4)
    uncertainty = entropies(logits)[0]
    mask = lowest_entropy(logits, 0.3)[0]
    assert float(uncertainty[mask].max()) < float(uncertainty[~mask].min())


def test_kept_sets_do_not_depend_on_the_order_of_views_1_to_the_last() -> None:
    logits = noise(128, 7)
    order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(127)])
    mask = cosine_then_entropy(logits, logits, 0.8, 0.3)
    assert torch.equal(cosine_then_entropy(logits[order], logits[order], 0.8, 0.3), mask[order])
    assert int(cosine_then_entropy(logits, logits, 0.8, 1.0).sum()) == 102
    assert bool(cosine_then_entropy(logits, logits, 0.1, 1.0)[0])


def test_without_a_cosine_filter_it_is_tpts_rule() -> None:
    logits = noise(3, 64, 7)
    assert torch.equal(cosine_then_entropy(logits, logits, 1.0, 0.1), lowest_entropy(logits, 0.1))
    assert bool(cosine_then_entropy(logits[:, :1], logits[:, :1], 0.5, 0.5).all())


def test_parallel_filters_are_two_filters_on_generated_views_and_one_on_the_others() -> None:
    logits, vectors = noise(30, 5), noise(30, 8, seed=1)
    mask = parallel_filters(logits, vectors, 10, 0.8, 0.3)
    uncertainty = entropies(logits)
    standard = set(uncertainty[:20].argsort()[:6].tolist())
    confident = {20 + i for i in uncertainty[20:].argsort()[:3].tolist()}
    cosine = torch.tensor([float(F.cosine_similarity(vectors[0], v, dim=0)) for v in vectors[20:]])
    near = {20 + i for i in cosine.argsort(descending=True)[:8].tolist()}
    assert set(mask.nonzero()[:, 0].tolist()) == standard | (confident & near)
    assert torch.equal(parallel_filters(logits, vectors, 0, 0.8, 0.3), lowest_entropy(logits, 0.3))


def test_votes() -> None:
    assert count_votes(torch.tensor([2, 2, 2, 0, 1]), 3, 4).tolist() == [0, 0, 1, 0]
    assert int(count_votes(torch.tensor([0, 1, 1, 0, 3, 1, 0]), 4, 4).argmax()) == 1  # 3 is in no tie, then 1
    assert int(count_votes(torch.tensor([3, 0, 2, 2]), 2, 4).argmax()) == 3  # nobody else names 0 or 3
    assert float(count_votes(torch.tensor([3, 0]), 2, 4).sum()) == pytest.approx(1)


def test_mode_of_identical_views_is_their_feature() -> None:
    feature = F.normalize(noise(6), dim=0)
    probs = noise(5).softmax(0)
    for views in (1, 2, 40):
        mode = robust_mode(feature.expand(views, -1).clone(), probs.expand(views, -1))
        torch.testing.assert_close(mode, feature, rtol=0, atol=1e-6)


def test_mode_follows_its_equations_and_leaves_outliers_out() -> None:
    centre, outlier = F.normalize(noise(8), dim=0), F.normalize(noise(8, seed=9), dim=0)
    near = F.normalize(centre + 0.05 * noise(18, 8, seed=1, scale=1), dim=-1)
    features = torch.cat([near, F.normalize(outlier + 0.02 * noise(3, 8, seed=2, scale=1), dim=-1)])
    probs = (20 * features @ F.normalize(noise(4, 8, seed=3), dim=-1).T).softmax(-1)
    mode = robust_mode(features, probs)
    torch.testing.assert_close(mode, mode_slowly(features, probs), rtol=0, atol=1e-5)
    assert float(mode @ centre) > 0.99
    assert float(mode @ centre) > float(F.normalize(features.mean(0), dim=0) @ centre)


def mode_slowly(features: Tensor, probs: Tensor) -> Tensor:
    """The paper's equations in float64, view by view."""
    x, p = features.double(), probs.double()
    n = len(x)
    h2 = []
    for i in range(n):
        distances = sorted(float((x[i] - x[j]).square().sum()) for j in range(n) if j != i)
        count = int(0.3 * (n - 1))
        h2.append(0.5 * sum(distances[:count]) / count)

    def density(m: Tensor, i: int) -> float:
        return math.exp(-float((x[i] - m).square().sum()) / (2 * h2[i]))

    y, m = [1 / n] * n, x[0]
    for _ in range(5):
        for _ in range(5):
            scores = [
                (density(m, i) + 4 * sum(y[j] * float(p[i] @ p[j]) for j in range(n))) / 0.2 for i in range(n)
            ]
            y = torch.tensor(scores).softmax(0).tolist()
        for _ in range(5):
            total = sum(y[i] * density(m, i) * x[i] for i in range(n))
            m = total / total.norm()
    return m.float()
