from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from vlprompt.training.options import TrainOptions
from vlprompt.training.schedule import learning_rate, stops


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


@pytest.mark.parametrize(("monitor", "mode"), [("loss", "min"), ("dice", "max")])
@pytest.mark.parametrize("seed", range(4))
def test_plateau_is_pytorchs_scheduler_replayed(monitor: str, mode: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = 1 + np.round(rng.normal(0.5, 0.2, 60) + np.linspace(0, 0.3, 60) * rng.choice([-1, 1]), 2)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode, factor=0.2, patience=3, eps=0)  # type: ignore[arg-type]
    options = TrainOptions(
        epochs=60, lr=0.1, schedule="plateau", warmup_epochs=0, plateau_patience=3, monitor=monitor
    )
    history: list[dict[str, float]] = []
    for epoch, value in enumerate(values):
        lr = learning_rate(options, epoch, 0, 5, history)
        assert lr == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        theirs.step(float(value))
        history.append({f"val/{monitor}": float(value)})
    assert lr < 0.1


def test_stopping_waits_for_a_better_figure_and_not_for_a_little_better_one() -> None:
    options = TrainOptions(stop_patience=3, stop_delta=0.01)
    losses = [1.0, 0.9, 0.895, 0.95, 0.899]  # the third to the fifth are no gain
    history = [{"val/loss": v} for v in losses]
    assert [stops(options, history[:n]) for n in range(6)] == [False] * 5 + [True]
    assert not stops(options, [*history[:4], {"val/loss": 0.8}])
    assert not stops(options.model_copy(update={"min_epochs": 6}), history)
    assert not stops(options, [{"loss": 1.0}] * 9)  # epochs without a validation don't count
    better = options.model_copy(update={"monitor": "dice"})
    assert stops(better, [{"val/dice": 0.5}] * 4)
    assert not stops(better, [{"val/dice": 0.1 * i} for i in range(9)])
