from __future__ import annotations

import itertools
import math

import pytest

from vlprompt.training.options import TrainOptions
from vlprompt.training.schedule import learning_rate


@pytest.mark.parametrize("epochs", [2, 5, 50])
def test_coop_schedule_follows_the_published_rule(epochs: int) -> None:
    options = TrainOptions(epochs=epochs, lr=0.002)
    rates = [learning_rate(options, e, 0, 7) for e in range(epochs)]
    assert rates[0] == 1e-5
    for epoch in range(1, epochs):
        assert rates[epoch] == pytest.approx(0.5 * 0.002 * (1 + math.cos(math.pi * (epoch - 1) / epochs)))
    # It never reaches zero: the last epoch stands at angle pi (E - 2) / E.
    assert rates[-1] == pytest.approx(0.5 * 0.002 * (1 + math.cos(math.pi * (epochs - 2) / epochs)))


def test_coop_schedule_is_constant_inside_an_epoch() -> None:
    options = TrainOptions(epochs=10)
    assert len({learning_rate(options, 4, step, 9) for step in range(9)}) == 1


def test_cosine_warms_up_linearly_and_ends_near_zero() -> None:
    options = TrainOptions(epochs=10, lr=1.0, schedule="cosine", warmup_epochs=1)
    rates = [learning_rate(options, e, s, 10) for e in range(10) for s in range(10)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == pytest.approx(1.0)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert 0 < rates[-1] < 1e-3


def test_constant_without_warmup() -> None:
    options = TrainOptions(epochs=3, lr=0.5, schedule="constant", warmup_epochs=0)
    assert {learning_rate(options, e, s, 4) for e in range(3) for s in range(4)} == {0.5}
