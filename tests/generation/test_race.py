from __future__ import annotations

import math

from vlprompt.generation.race import Race, summary_table


def race(name: str, mine: list[float], theirs: list[float]) -> Race:
    made = Race(name)
    for label, values, per_step in (("base", theirs, 0.2), ("fast", mine, 0.1)):
        history = [
            {"step": 10.0 * i, "seconds": 10 * per_step * i, "similarity": v} for i, v in enumerate(values)
        ]
        made.add(label, {"start": 0.5, "seconds": history[-1]["seconds"], "history": history})
    return made


def test_arrivals_by_hand() -> None:
    first = race("a", [0.2, 0.7, 0.9, 0.9, 0.9], [0.2, 0.4, 0.6, 0.6, 0.6])
    assert first.final("base") == (0.6 + 0.6 + 0.6) / 3
    assert first.best("base") == 0.6
    assert first.arrival("fast", first.best("base")) == (10.0, 1.0)
    assert first.arrival("base", first.best("base")) == (20.0, 4.0)
    second = race("b", [0.3, 0.4, 0.5, 0.6, 0.8], [0.3, 0.5, 0.7, 0.7, 0.7])
    table, numbers = summary_table([first, second], "base")
    # the second needs 40 steps and 4 s where the baseline needs 20 and 4: (4 + 4) s against (1 + 4) s
    assert numbers["fast/steps"] == (10 + 40) / 2
    assert numbers["fast/seconds"] == (1 + 4) / 2
    assert math.isclose(numbers["fast/speedup"], 8 / 5)
    assert math.isclose(numbers["fast/best"], (0.9 + 0.8) / 2)
    assert math.isclose(numbers["fast/last"], (0.9 + (0.5 + 0.6 + 0.8) / 3) / 2)
    assert "| fast | 0.250 |" in table
    assert "| 100 | 25 | 2.5 | 1.6 |" in table


def test_who_never_arrives_is_said() -> None:
    slow = race("a", [0.1, 0.1, 0.1, 0.1], [0.1, 0.5, 0.5, 0.5])
    table, numbers = summary_table([slow], "base")
    assert numbers["fast/arrived"] == 0
    assert numbers["fast/speedup"] is None
    assert "| never 0 of 1 | never | never |" in table
