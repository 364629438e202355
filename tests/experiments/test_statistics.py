"""Intervals against SciPy, harmonic means against published numbers."""

from __future__ import annotations

import pytest
from scipy import stats

from vlprompt.core.errors import DataError
from vlprompt.experiments.statistics import (
    harmonic_mean,
    harmonic_mean_of_averages,
    paired_difference,
    summarise,
)


def test_interval_is_scipys() -> None:
    values = [0.61, 0.64, 0.66, 0.60]
    found = summarise(values)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=found.mean, scale=stats.sem(values))
    assert (found.mean - found.ci95, found.mean + found.ci95) == pytest.approx((low, high))
    assert found.n == 4


def test_three_seeds_by_hand() -> None:
    # Mean 2, std 1, t(0.975, 2) = 4.3027: half-width 4.3027 / sqrt(3).
    found = summarise([1, 2, 3])
    assert (found.mean, found.std) == (2, 1)
    assert found.ci95 == pytest.approx(4.30265 / 3**0.5, rel=1e-5)


def test_one_run_claims_no_interval() -> None:
    assert summarise([0.5]).flat("accuracy") == {"accuracy": 0.5}
    with pytest.raises(DataError, match="no values"):
        summarise([])


def test_paired_difference_sees_through_a_common_swing() -> None:
    ours, theirs = [0.50, 0.70, 0.91], [0.48, 0.68, 0.88]
    paired = paired_difference(ours, theirs)
    assert paired.mean == pytest.approx(0.07 / 3)
    assert paired.mean - paired.ci95 > 0  # although the two intervals overlap widely
    assert summarise(ours).ci95 > 0.4
    with pytest.raises(DataError, match="got 3 and 1"):
        paired_difference(ours, [0.1])


def test_harmonic_mean() -> None:
    assert harmonic_mean(0.8, 0.4) == pytest.approx(0.5333333)
    assert harmonic_mean(0.0, 0.0) == 0.0
    # Zhou et al., CVPR 2022, table 1: CoCoOp's averages 80.47 and 71.69 give 75.83.
    assert harmonic_mean(0.8047, 0.7169) == pytest.approx(0.7583, abs=5e-5)


def test_harmonic_mean_of_averages_is_not_the_average() -> None:
    base, new = [0.9, 0.5], [0.1, 0.5]
    assert harmonic_mean_of_averages(base, new) == pytest.approx(harmonic_mean(0.7, 0.3))
    assert harmonic_mean_of_averages(base, new) != pytest.approx((0.18 + 0.5) / 2)
