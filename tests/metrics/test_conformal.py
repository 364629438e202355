"""A calibrated threshold: what it promises holds over many draws, and what can't be promised is refused."""

from __future__ import annotations

import pytest
import torch

from vlprompt.core.errors import DataError, NonFiniteError
from vlprompt.metrics.conformal import conformal_threshold, fewest_scores


def test_the_threshold_by_hand() -> None:
    scores = (
        torch.arange(1, 20, dtype=torch.float64) / 100
    )  # 0.01 to 0.19: n = 19, so k = ceil(20 * 0.9) = 18
    threshold = conformal_threshold(scores, 0.1)
    assert float(scores[17]) < threshold < float(scores[18])
    assert threshold == pytest.approx(0.18, abs=1e-9)


@pytest.mark.parametrize("rate", [0.05, 0.2])
def test_further_clean_scores_reach_it_as_rarely_as_promised(rate: float) -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(4000, 40, generator=generator) ** 5
    reached = [float(row[-1]) >= conformal_threshold(row[:-1], rate) for row in draws]
    share = sum(reached) / len(reached)
    # Exactly rate where (n + 1) rate is whole, as 40 * 0.05 and 40 * 0.2 are.
    assert share == pytest.approx(rate, abs=3 * (rate * (1 - rate) / 4000) ** 0.5)


@pytest.mark.parametrize(("rate", "fewest"), [(0.05, 19), (0.1, 9), (0.5, 1), (0.3, 3)])
def test_too_few_images_promise_nothing(rate: float, fewest: int) -> None:
    assert fewest_scores(rate) == fewest
    conformal_threshold(torch.rand(fewest), rate)
    with pytest.raises(
        DataError, match=f"{fewest - 1} clean images can't promise .* at least {fewest} are needed"
    ):
        conformal_threshold(torch.rand(fewest - 1), rate)


def test_impossible_rates_and_scores() -> None:
    for rate in (0.0, 1.0, -0.1):
        with pytest.raises(DataError, match="between 0 and 1"):
            conformal_threshold(torch.rand(50), rate)
    with pytest.raises(NonFiniteError, match="no numbers"):
        conformal_threshold(torch.tensor([0.1] * 30 + [float("nan")]), 0.1)
