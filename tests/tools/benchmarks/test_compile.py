"""The benchmark of compiled steps compares like with like, and counts what the compiler takes."""

from __future__ import annotations

import shutil

import pytest
import torch

from benchmarks import BENCHMARKS


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for processors with g++")
def test_both_ways_have_the_same_loss() -> None:
    torch._dynamo.reset()
    result = BENCHMARKS.get("compile").target(backbone="tiny", learner="coop", classes=3, batch=2, repeats=1)
    assert result["has_compiler"]
    assert result["loss_difference"] < 1e-4
    assert result["warmup_s"] > result["compiled_s"]
