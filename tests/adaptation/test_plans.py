"""Streams are what their plans say, the same for the same seed."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from vlprompt.adaptation.plans import StreamPlan, worst_tenth
from vlprompt.core.errors import ConfigError

LABELS = [number % 6 for number in range(240)]


def runs(labels: list[int]) -> int:
    return 1 + sum(a != b for a, b in pairwise(labels))


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "separate"])
def test_every_image_comes_once_and_the_seed_decides(kind: str) -> None:
    plan = StreamPlan(kind, batch=40)  # type: ignore[arg-type]
    order = plan.order(LABELS, 3)
    assert sorted(order) == list(range(240))
    assert order == plan.order(LABELS, 3)
    assert order != plan.order(LABELS, 4)


def test_classes_come_one_after_another_in_a_separate_stream() -> None:
    stream = [LABELS[i] for i in StreamPlan("separate").order(LABELS, 1)]
    assert runs(stream) == 6
    inside = StreamPlan("separate").order(LABELS, 1)[:40]
    assert inside != sorted(inside)


def test_a_small_gamma_makes_few_classes_of_a_slot() -> None:
    def present(gamma: float) -> float:
        order = StreamPlan("dirichlet", gamma=gamma, batch=40).order(LABELS, 1)
        return float(np.mean([len({LABELS[i] for i in order[k : k + 40]}) for k in range(0, 240, 40)]))

    assert present(0.001) < present(0.3) < present(1000.0) == 6


def test_tasks_have_few_classes_and_no_image_twice() -> None:
    plan = StreamPlan("tasks", batch=32, classes=(1, 2), tasks=5)
    order = plan.order(LABELS, 1)
    assert len(order) == 160
    for first in range(0, 160, 32):
        task = order[first : first + 32]
        assert len(set(task)) == 32
        assert len({LABELS[i] for i in task}) <= 2
    short = StreamPlan("tasks", batch=64, classes=(1, 1), tasks=1).order(LABELS, 1)
    assert len(short) == 40  # the class has no more
    with pytest.raises(ConfigError, match="the fewest first"):
        StreamPlan("tasks", classes=(4, 2)).order(LABELS, 1)


def test_sets_keep_their_order_in_time() -> None:
    sets = [number // 80 for number in range(240)]
    order = StreamPlan("temporal").order(LABELS, 1, sets=sets)
    assert [sets[i] for i in order] == sets
    assert order != list(range(240))
    with pytest.raises(ConfigError, match="needs the set of every image"):
        StreamPlan("temporal").order(LABELS, 1)


@pytest.mark.parametrize(("share", "strangers", "known"), [(0.5, 40, 40), (0.1, 22, 200)])
def test_a_mixed_stream_has_its_share_of_intruders(share: float, strangers: int, known: int) -> None:
    intruders = [number >= 200 for number in range(240)]
    order = StreamPlan("mixed", share=share).order(LABELS, 1, intruders=intruders)
    assert (sum(i >= 200 for i in order), sum(i < 200 for i in order)) == (strangers, known)
    assert len(set(order)) == len(order)
    with pytest.raises(ConfigError, match="known images and intruders"):
        StreamPlan("mixed").order(LABELS, 1)


def test_the_worst_tenth() -> None:
    assert worst_tenth([0.5, 0.9, 0.7]) == 0.5
    assert worst_tenth([x / 100 for x in range(20)]) == pytest.approx(0.005)
