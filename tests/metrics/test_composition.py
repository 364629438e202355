"""The bias sweep against a sweep by brute force, and against cases worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from vlprompt.core.errors import DataError
from vlprompt.metrics.composition import bias_sweep, open_world_accuracy


def draw(seed: int, samples: int = 40, compositions: int = 9) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(samples, compositions, generator=generator)
    seen = torch.tensor([True, False, True, True, False, True, False, True, True])
    possible = torch.tensor([True] * 8 + [False])
    truth = torch.randint(8, (samples,), generator=generator)
    scores[torch.arange(samples), truth] += 1.0
    return scores, truth, seen, possible


def brute(scores: Tensor, truth: Tensor, seen: Tensor, possible: Tensor, bias: float) -> tuple[float, float]:
    """Accuracy on images of seen and of unseen compositions: add the bias, take the best possible one, count."""
    order = np.argsort(~seen.numpy(), kind="stable")  # of equal scores the seen one
    table = scores.double().numpy() + np.where(seen.numpy(), 0.0, bias)
    table[:, ~possible.numpy()] = -np.inf
    right = order[table[:, order].argmax(1)] == truth.numpy()
    own_seen = seen.numpy()[truth.numpy()]
    return float(right[own_seen].mean()), float(right[~own_seen].mean())


@pytest.mark.parametrize("seed", range(4))
def test_exact_equals_a_fine_grid_of_biases(seed: int) -> None:
    scores, truth, seen, possible = draw(seed)
    sweep = bias_sweep(scores, truth, seen, possible)
    for bias, a, b in zip(sweep.biases, sweep.seen, sweep.unseen, strict=True):
        assert (a, b) == brute(scores, truth, seen, possible, float(np.clip(bias, -1e6, 1e6)))
    grid = np.linspace(-8, 8, 3001)
    points = np.array([brute(scores, truth, seen, possible, float(b)) for b in grid])
    # A grid misses changes that fall between two of its biases; the exact curve can only be better.
    area = float(np.sum((points[1:, 0] + points[:-1, 0]) / 2 * np.diff(points[:, 1])))
    assert sweep["auc"] == pytest.approx(area, abs=2e-3)
    assert sweep["best_seen"] == points[:, 0].max()
    assert sweep["best_unseen"] == points[:, 1].max()
    means = 2 * points.prod(1) / np.maximum(points.sum(1), 1e-12)
    assert sweep["best_hm"] >= means.max() - 1e-12
    assert 0 <= sweep["auc"] <= 1


@pytest.mark.parametrize("seed", range(4))
def test_parity_visits_the_reference_biases(seed: int) -> None:
    scores, truth, seen, possible = draw(seed)
    sweep = bias_sweep(scores, truth, seen, possible, "parity")
    masked = scores.double().masked_fill(~possible, -1e10)
    tips = []
    for row, true in zip(masked, truth.tolist(), strict=True):
        if not seen[true] and int((row + 1e3 * (~seen)).argmax()) == true:
            tips.append(float(row[seen].max() - row[true]) - 1e-4)
    step = max(1, len(tips) // 20)
    assert sweep.biases == pytest.approx([*sorted(tips)[::step], 1e3])
    exact = bias_sweep(scores, truth, seen, possible)
    assert sweep["best_hm"] <= exact["best_hm"] + 1e-12
    assert sweep["auc"] <= exact["auc"] + 1e-12


def test_a_case_by_hand_and_scores_stay_as_they_are() -> None:
    scores = torch.tensor([[2.0, 1.0], [2.0, 1.0], [3.0, 0.0]])  # composition 0 seen, 1 unseen
    before = scores.clone()
    sweep = bias_sweep(
        scores, torch.tensor([0, 1, 1]), torch.tensor([True, False]), torch.ones(2, dtype=torch.bool)
    )
    # bias below 1: (1, 0); between 1 and 3: (0, 1/2); above 3: (0, 1)
    assert sweep.seen.tolist() == [1.0, 0.0, 0.0]
    assert sweep.unseen.tolist() == [0.0, 0.5, 1.0]
    assert sweep["auc"] == pytest.approx(0.25)
    assert sweep["best_hm"] == 0.0
    assert torch.equal(scores, before)


def test_a_perfect_and_a_hopeless_scorer() -> None:
    truth = torch.arange(4).repeat(3)
    seen = torch.tensor([True, True, False, False])
    perfect = torch.nn.functional.one_hot(truth, 4).float() * 10
    every = torch.ones(4, dtype=torch.bool)
    assert bias_sweep(perfect, truth, seen, every) == pytest.approx(
        {"auc": 1.0, "best_hm": 1.0, "best_seen": 1.0, "best_unseen": 1.0}
    )
    hopeless = bias_sweep(perfect.roll(1, 1), truth, seen, every, "parity")  # no unseen sample is ever right
    assert hopeless["best_hm"] <= 1.0
    assert open_world_accuracy(perfect, truth) == 1.0


def test_what_can_not_be_swept_is_refused() -> None:
    scores, truth, seen, possible = draw(0)
    with pytest.raises(DataError, match="images of seen and of unseen compositions"):
        bias_sweep(scores, truth, torch.ones_like(seen), possible)
    with pytest.raises(DataError, match="not among the possible"):
        bias_sweep(scores, truth, seen, possible & (torch.arange(9) != 0))
