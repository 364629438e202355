from __future__ import annotations

import math

from vlprompt.experiments.results import Line, Results
from vlprompt.generation.race import Race, arrivals, races_of, timing_figures, timing_table

METHODS = ["base", "fast"]


def race(name: str, mine: list[float], theirs: list[float]) -> Race:
    curves = {
        label: [(10 * i, value) for i, value in enumerate(values)]
        for label, values in (("base", theirs), ("fast", mine))
    }
    return Race(name, 1, curves)


def clocks_of(races: list[Race]) -> dict[tuple[str, str, int], dict[int, float]]:
    """A step takes 0.2 s with the baseline and 0.1 s with the other."""
    per_step = {"base": 0.2, "fast": 0.1}
    return {
        (label, one.concept, one.seed): {step: step * per_step[label] for step, _ in one.curves[label]}
        for one in races
        for label in METHODS
    }


def test_arrivals_by_hand() -> None:
    first = race("a", [0.2, 0.7, 0.9, 0.9, 0.9], [0.2, 0.4, 0.6, 0.6, 0.6])
    assert first.last("base") == (0.6 + 0.6 + 0.6) / 3
    assert first.best("base") == 0.6
    assert first.arrival("fast", first.best("base")) == 10
    assert first.arrival("base", first.best("base")) == 20
    second = race("b", [0.3, 0.4, 0.5, 0.6, 0.8], [0.3, 0.5, 0.7, 0.7, 0.7])
    races = [first, second]
    assert arrivals(races, "fast", "base") == [(first, 10, 20), (second, 40, 20)]
    # the second needs 40 steps and 4 s where the baseline needs 20 and 4: (4 + 4) s against (1 + 4) s
    figures = timing_figures(races, METHODS, "base", clocks_of(races))
    assert figures["fast"]["seconds"] == (1 + 4) / 2
    assert math.isclose(figures["fast"]["speedup"] or 0, 8 / 5)
    assert math.isclose(figures["fast"]["seconds_per_step"] or 0, 0.1)
    assert "| fast | 100 | 2.5 | 1.6 |" in timing_table(figures, "base")


def test_who_never_arrives_and_who_is_there_at_once_is_said() -> None:
    slow = [race("a", [0.1, 0.1, 0.1, 0.1], [0.1, 0.5, 0.5, 0.5])]
    assert arrivals(slow, "fast", "base") == []
    figures = timing_figures(slow, METHODS, "base", clocks_of(slow))
    assert figures["fast"]["speedup"] is None
    assert "| fast | 100 | never | never |" in timing_table(figures, "base")
    there = [race("a", [0.9, 0.1], [0.1, 0.5])]
    figures = timing_figures(there, METHODS, "base", clocks_of(there))
    assert "| fast | 100 | 0.0 | at once |" in timing_table(figures, "base")


def test_only_races_that_all_methods_finished_count() -> None:
    lines = []
    for concept, methods in (("a", METHODS), ("b", ["base"])):
        for method in methods:
            for step in (0, 5):
                where = {"method": method, "concept": concept, "seed": 3, "step": step}
                lines.append(Line(where, "similarity", 0.1 * step))
    (only,) = races_of(Results(lines), METHODS)
    assert (only.concept, only.seed) == ("a", 3)
    assert only.curves == {"base": [(0, 0.0), (5, 0.5)], "fast": [(0, 0.0), (5, 0.5)]}
