"""The benchmark of multitask training compares like with like: the same update, from fewer sentences."""

from __future__ import annotations

import pytest

from benchmarks import BENCHMARKS
from benchmarks.multitask import _SUITES, _tasks
from vlprompt.backbones import Backbone
from vlprompt.core.errors import DataError
from vlprompt.data.cards import card_names, load_card


@pytest.mark.parametrize(("family", "suite"), [("coop", "elevater"), ("upt", "coop"), ("vpt", "one")])
def test_both_ways_take_the_same_step(
    family: str, suite: str, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.multitask.create_backbone", lambda name: backbone)
    found = BENCHMARKS.get("multitask").target(suite=suite, family=family, classes=30, batch=2, draws=3)
    assert found["update_rel_diff"] < 1e-4
    assert found["speedup"] == pytest.approx(found["naive_s"] / found["fast_s"])
    if suite == "one":
        assert found["tasks"] == 1
        assert found["classes_encoded"] == found["classes_expected"] == 30
    else:
        assert found["tasks"] > 1
        assert 2 <= found["classes_encoded"] < 30
    assert "encode" not in vars(backbone.text)


def test_tasks_are_divided_like_the_suites() -> None:
    names = [str(i) for i in range(1151)]
    sizes = [len(own) for own, _ in _tasks(names, _SUITES["elevater"]).values()]
    elevater = [len(load_card(n).classnames) for n in card_names() if n.startswith("elevater_")]
    assert sizes == sorted(elevater, reverse=True)
    tasks = _tasks(names[:100], _SUITES["coop"])
    assert [name for own, _ in tasks.values() for name in own] == names[:100]
    assert [len(own) for own, _ in tasks.values()] == [46, 18, 9, 5, 5, 5, 4, 4, 2, 2]
    with pytest.raises(DataError, match="3 classes are too few for 20 tasks"):
        _tasks(names[:3], _SUITES["elevater"])
