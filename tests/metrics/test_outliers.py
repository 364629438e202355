"""Scores of known images and strangers, against counting."""

from __future__ import annotations

import pytest
import torch

from vlprompt.core.errors import DataError, NonFiniteError
from vlprompt.metrics.classification import compute
from vlprompt.metrics.outliers import auroc, average_precision, false_positives_at_95, open_set_rate

KNOWN = torch.tensor([0.9, 0.8, 0.8, 0.4, 0.3])
STRANGERS = torch.tensor([0.8, 0.5, 0.3, 0.1])


def test_auroc_counts_pairs_and_halves_ties() -> None:
    wins = sum(float(k > s) + 0.5 * float(k == s) for k in KNOWN for s in STRANGERS)
    assert auroc(KNOWN, STRANGERS) == pytest.approx(wins / 20)
    assert auroc(torch.ones(3), torch.ones(4)) == 0.5
    assert average_precision(torch.tensor([2.0, 3.0]), torch.tensor([0.0, 1.0])) == 1.0


def test_false_positives_at_the_first_threshold_that_enough_known_images_pass() -> None:
    assert false_positives_at_95(KNOWN, STRANGERS) == 0.75  # all known images must pass: threshold 0.3
    assert false_positives_at_95(KNOWN, STRANGERS, rate=0.6) == 0.25  # three of five: threshold 0.8
    twenty = torch.arange(20.0)
    assert false_positives_at_95(twenty, torch.tensor([0.0, 1.0])) == 0.5  # one of twenty may fail


def test_open_set_rate_is_the_area_by_hand() -> None:
    right = torch.tensor([True, False])
    # Thresholds 3, 2, 1: (strangers, rightly named) pass (0, .5), (.5, .5), (.5, .5), and at the end (1, .5).
    value = open_set_rate(torch.tensor([3.0, 1.0]), right, torch.tensor([2.0, 0.5]))
    assert value == pytest.approx(0.5)
    assert open_set_rate(torch.tensor([3.0, 3.0]), torch.tensor([True, True]), torch.tensor([0.0])) == 1.0
    assert open_set_rate(torch.tensor([3.0]), torch.tensor([False]), torch.tensor([0.0])) == 0.0


def test_nothing_to_compare_and_damaged_scores() -> None:
    with pytest.raises(DataError, match="got 0 and 4"):
        auroc(torch.zeros(0), STRANGERS)
    with pytest.raises(NonFiniteError):
        false_positives_at_95(KNOWN, torch.tensor([float("nan")]))


def test_brier_is_the_squared_distance_and_twenty_bins_are_finer() -> None:
    probs = torch.tensor([[0.7, 0.3], [0.2, 0.8]])
    got = compute(probs.log(), torch.tensor([0, 0]), ["brier", "ece", "ece_20"])
    assert got["brier"] == pytest.approx((0.09 + 0.09 + 0.64 + 0.64) / 2)
    assert got["ece"] == pytest.approx(got["ece_20"])
    close = torch.tensor([[0.51, 0.49], [0.53, 0.47]])  # one bin of fifteen, and one of twenty
    split = torch.tensor([[0.54, 0.46], [0.56, 0.44]])  # 0.55 parts bins of a twentieth
    labels = torch.tensor([0, 1])
    assert compute(close.log(), labels, ["ece_20"])["ece_20"] == pytest.approx(0.02, abs=1e-6)
    assert compute(split.log(), labels, ["ece_20"])["ece_20"] == pytest.approx(0.51, abs=1e-6)
