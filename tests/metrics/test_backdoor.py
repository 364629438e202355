"""Figures of a scanner on scores whose figures are counted by hand."""

from __future__ import annotations

import pytest
import torch

from vlprompt.core.errors import DataError
from vlprompt.metrics.backdoor import false_alarms_at, scan_metrics


def test_figures_by_hand() -> None:
    score = torch.tensor([0.1, 0.2, 0.3, 0.8, 0.9, 0.25, 0.7])
    trigger = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    seen = torch.tensor([True, True, True, True, True, False, True])
    figures = scan_metrics(score, trigger, seen, 0.5, ["clean", "badnets", "sig"])
    assert figures["fpr"] == 0.25
    assert figures["tpr"] == pytest.approx(2 / 3)
    assert figures["tpr/seen"] == 1.0
    assert figures["tpr/unseen"] == 0.0
    # 12 comparisons of a poisoned and a clean image: 0.9 wins 4, 0.25 wins 2, 0.7 wins 3
    assert figures["auroc"] == pytest.approx(9 / 12)
    assert figures["auroc/seen"] == pytest.approx(7 / 8)
    assert figures["auroc/unseen"] == pytest.approx(2 / 4)
    assert figures["auroc/badnets"] == pytest.approx(6 / 8)
    assert figures["auroc/sig"] == pytest.approx(3 / 4)
    assert figures["fpr_at_95_tpr"] == 0.5


def test_false_alarms_are_counted_at_the_largest_threshold_that_finds_enough() -> None:
    poisoned = torch.arange(1, 21) / 20
    assert (
        false_alarms_at(torch.tensor([0.04, 0.09, 0.1, 0.5]), poisoned) == 0.5
    )  # threshold 0.1 finds 19 of 20
    assert false_alarms_at(torch.tensor([0.04, 0.09, 0.1, 0.5]), poisoned, rate=1.0) == 0.75


def test_one_kind_alone_can_not_be_measured() -> None:
    with pytest.raises(DataError, match="need clean and triggered"):
        scan_metrics(torch.rand(3), torch.zeros(3, dtype=torch.long), torch.ones(3, dtype=torch.bool), 0.5)
