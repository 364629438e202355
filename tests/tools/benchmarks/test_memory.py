"""The benchmark of page faults counts them in both ways."""

from __future__ import annotations

import pytest

from benchmarks import BENCHMARKS
from vlprompt.core.memory import keep_freed_memory


@pytest.mark.slow
def test_both_ways_are_counted() -> None:
    if not keep_freed_memory():
        pytest.skip("this system has no glibc")
    found = BENCHMARKS.get("memory").target(backbone="tiny", batch=256, batches=3, threads=1, repeats=1)
    assert found["kept"]["page_faults"] < found["system"]["page_faults"]
    assert found["cpu_ratio"] > 0
