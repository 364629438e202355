"""The benchmark of very many names takes a step that learns."""

from __future__ import annotations

import pytest

from benchmarks import BENCHMARKS
from vlprompt.backbones import Backbone


def test_a_step_over_many_names_learns(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.names.create_backbone", lambda name: backbone)
    found = BENCHMARKS.get("names").target(classes=300, context=2, batch=4)
    assert found["update_norm"] > 0
    for part in ("features", "learner", "step"):
        assert found[part]["seconds"] > 0
