"""Metrics against cases worked by hand, scikit-learn and definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score

from vlprompt.core.errors import DataError, NonFiniteError, UnknownNameError
from vlprompt.experiments.tables import is_fraction
from vlprompt.metrics.classification import METRICS, compute, map_11_point, map_11_point_elevater


def logits_of(probs: list[list[float]]) -> torch.Tensor:
    return torch.tensor(probs, dtype=torch.float64).log()


def test_accuracy_and_nll_of_three_samples() -> None:
    logits = logits_of([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]])
    found = compute(logits, torch.tensor([0, 1, 1]), ["accuracy", "nll"])
    assert found["accuracy"] == pytest.approx(2 / 3)
    assert found["nll"] == pytest.approx(-(math.log(0.9) + math.log(0.2) + math.log(0.7)) / 3)


def test_mean_per_class_leaves_out_an_absent_class() -> None:
    # Class 0: 3 of 4 right; class 2: 1 of 1 right; class 1 has no sample, though one is guessed as it.
    guesses = torch.tensor([0, 0, 0, 1, 2])
    labels = torch.tensor([0, 0, 0, 0, 2])
    logits = torch.nn.functional.one_hot(guesses, 3).double()
    assert compute(logits, labels, ["mean_per_class"])["mean_per_class"] == pytest.approx((3 / 4 + 1) / 2)


def test_mean_per_class_is_balanced_accuracy() -> None:
    rng = np.random.default_rng(0)
    labels, logits = rng.integers(0, 5, 200), rng.normal(size=(200, 5))
    expected = balanced_accuracy_score(labels, logits.argmax(1))
    found = compute(torch.from_numpy(logits), torch.from_numpy(labels), ["mean_per_class"])
    assert found["mean_per_class"] == pytest.approx(expected)


def test_ece_of_samples_in_bins_of_their_own() -> None:
    # Confidences .9 right, .8 wrong, .7 right lie in different fifteenths: (.1 + .8 + .3) / 3.
    logits = logits_of([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]])
    assert compute(logits, torch.tensor([0, 1, 1]), ["ece"])["ece"] == pytest.approx(0.4, abs=1e-6)


def test_ece_of_one_shared_bin() -> None:
    # Four samples at .75, three of them right: perfectly calibrated.
    logits = logits_of([[0.75, 0.25]] * 4)
    assert compute(logits, torch.tensor([0, 0, 0, 1]), ["ece"])["ece"] == pytest.approx(0.0, abs=1e-6)


def test_roc_auc_counts_pairs_in_order() -> None:
    # p(class 1) = .1 .4 .35 .8 with labels 0 0 1 1: three of the four pairs stand in the right order.
    logits = logits_of([[0.9, 0.1], [0.6, 0.4], [0.65, 0.35], [0.2, 0.8]])
    assert compute(logits, torch.tensor([0, 0, 1, 1]), ["roc_auc"])["roc_auc"] == pytest.approx(0.75)


def test_map_11_point_of_four_samples() -> None:
    # Ranked: hit, miss, hit, miss. Recall 1/2 at precision 1, recall 1 at precision 2/3.
    # t = 0 ... .5 (six thresholds) take 1, t = .6 ... 1 (five) take 2/3.
    scores = torch.tensor([[4.0], [3.0], [2.0], [1.0]])
    truth = torch.tensor([[1], [0], [1], [0]])
    assert map_11_point(scores, truth) == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)
    assert map_11_point(scores * 10 - 3, truth) == map_11_point(scores, truth)  # only ranks matter


def test_map_11_point_reaches_a_recall_of_exactly_seven_tenths() -> None:
    # Ten positives, seven on top, then a miss: t = .7 must still see precision 1, though 7 * 0.1 > 0.7 in
    # floats.
    truth = torch.tensor([1] * 7 + [0] + [1] * 3)[:, None]
    scores = torch.arange(11, 0, -1).double()[:, None]
    assert map_11_point(scores, truth) == pytest.approx((8 * 1 + 3 * 10 / 11) / 11)


def test_map_11_point_does_not_depend_on_the_order_of_equal_scores() -> None:
    scores = torch.tensor([[1.0], [1.0], [1.0], [0.0]])
    for labels in ([1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 1, 1]):
        # One of three at the first threshold, two of four at the second.
        assert map_11_point(scores, torch.tensor(labels)[:, None]) == pytest.approx(0.5)


def test_elevaters_map_counts_a_precision_of_one_at_a_recall_of_zero() -> None:
    """The value that its toolkit's own test states for these predictions (vision-evaluation, test_evaluators.py)."""
    truth = torch.tensor([[1, 0], [0, 1], [0, 1], [0, 1], [1, 0], [1, 0], [0, 1], [0, 1], [0, 1], [1, 0]])
    first = torch.tensor([1, 0, 0.5, 0.1, 0.44, 0.09, 0.91, 0.37, 0.34, 0.89])
    scores = torch.stack([first, torch.tensor([0, 1, 0.5, 0.9, 0.56, 0.91, 0.09, 0.63, 0.66, 0.11])], 1)
    assert map_11_point_elevater(scores, truth) == pytest.approx(0.7406926406926406, abs=1e-6)

    worst = torch.tensor([[0.0], [1.0]])
    assert map_11_point(worst, torch.tensor([[1], [0]])) == pytest.approx(0.5)
    assert map_11_point_elevater(worst, torch.tensor([[1], [0]])) == pytest.approx((10 * 0.5 + 1) / 11)


def test_map_11_point_skips_classes_without_positives() -> None:
    scores = torch.tensor([[4.0, 1.0], [3.0, 2.0]])
    assert map_11_point(scores, torch.tensor([[1, 0], [0, 0]])) == 1.0
    with pytest.raises(DataError, match="every label is 0"):
        map_11_point(scores, torch.zeros(2, 2, dtype=torch.long))


@pytest.mark.parametrize("name", sorted(METRICS))
def test_order_of_samples_does_not_matter(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(50, 2, generator=generator)
    labels = torch.randint(0, 2, (50,), generator=generator)
    order = torch.randperm(50, generator=generator)
    direct, shuffled = (
        compute(*pair, [name])[name] for pair in ((logits, labels), (logits[order], labels[order]))
    )
    assert shuffled == pytest.approx(direct)
    assert not is_fraction(name) or 0 <= direct <= 1


def test_probability_zero_is_allowed_and_nan_is_not() -> None:
    assert compute(logits_of([[1.0, 0.0]]), torch.tensor([0]), ["nll", "ece"]) == {"nll": 0.0, "ece": 0.0}
    with pytest.raises(NonFiniteError, match="1 of 2 samples"):
        compute(torch.tensor([[0.0, float("nan")], [0.0, 1.0]]), torch.tensor([0, 1]))


def test_mistakes_are_named() -> None:
    logits, labels = torch.zeros(3, 4), torch.tensor([0, 1, 2])
    with pytest.raises(UnknownNameError, match="'accuracy'"):
        compute(logits, labels, ["acuracy"])
    with pytest.raises(DataError, match="0 to 7, but there are 4"):
        compute(logits, torch.tensor([0, 1, 7]))
    with pytest.raises(DataError, match="no samples"):
        compute(torch.zeros(0, 4), torch.zeros(0))
    with pytest.raises(DataError, match="2 classes, got 4"):
        compute(logits, labels, ["roc_auc"])
    with pytest.raises(DataError, match="multi-label"):
        compute(logits, torch.ones(3, 4), ["mean_per_class"])


def test_multi_label_accuracy_counts_any_class_that_is_there() -> None:
    logits = logits_of([[3, 1, 0], [0, 3, 1], [0, 1, 3]])
    truth = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 0, 1]])
    assert compute(logits, truth, ["accuracy"]) == {"accuracy": pytest.approx(2 / 3)}


def test_which_keys_are_fractions() -> None:
    fractions = [
        "accuracy",
        "shots16/accuracy_ci95",
        "base/ece_std",
        "new/zero_shot_accuracy",
        "shots5/score",
    ]
    assert all(map(is_fraction, fractions))
    assert not any(map(is_fraction, ["nll", "val/nll_std", "runs", "seconds", "grace"]))
