"""Benchmarks measure half precision in turns with float32, and say how near it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks import BENCHMARKS
from vlprompt.backbones import Backbone


@pytest.fixture(autouse=True)
def _small(make_backbone: Callable[..., Backbone], monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks build the small backbone of the tests."""

    def build(name: str, precision: Any = "fp32") -> Backbone:
        return make_backbone().set_precision(precision)

    for module in ("text", "tta", "learners", "masks"):
        monkeypatch.setattr(f"benchmarks.{module}.create_backbone", build)


def test_text() -> None:
    half = BENCHMARKS.get("text").target(classes=5, repeats=1, precision="bf16")["bf16"]
    assert 0.99 < half["smallest_cosine"] < 1
    assert 0.95 < half["grad_cosine"] < 1
    assert half["speedup"] > 0
    assert half["over_fp32"] > 0


@pytest.mark.slow
def test_test_time_tuning() -> None:
    options = {"classes": 5, "views": 10, "images": 2, "repeats": 1, "precision": "bf16"}
    half = BENCHMARKS.get("tta").target(**options)["bf16"]
    assert 0 < half["max_abs_diff_probs"] < 0.1
    assert half["speedup"] > 0
    assert "speedup" not in BENCHMARKS.get("tta").target(**options, naive=False)["bf16"]


def test_learners() -> None:
    options = {"classes": 5, "batch": 3, "repeats": 1, "precision": "bf16", "only": "maple"}
    row = BENCHMARKS.get("learners").target(**options, isolated=False)["learners"]["maple"]
    assert 0.9 < row["bf16"]["update_cosine"] < 1
    assert row["bf16"]["speedup"] == pytest.approx(row["naive_s"] / row["bf16"]["seconds"])


@pytest.mark.slow
def test_masks() -> None:
    result = BENCHMARKS.get("masks").target(classes=3, batch=2, precision="bf16")
    ratio = result["port"]["cpu_seconds"] / result["bf16"]["cpu_seconds"]
    assert result["ratios"]["bf16_speedup_over_port"] == pytest.approx(ratio)
