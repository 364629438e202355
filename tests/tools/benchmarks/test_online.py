"""The benchmark of methods on features."""

from __future__ import annotations

import pytest

from benchmarks.online import bench_online
from vlprompt.core.errors import VLPromptError


@pytest.mark.parametrize("method", ["bca", "stata"])
def test_it_counts_images(method: str) -> None:
    result = bench_online(method=method, classes=5, dim=16, images=20)
    assert result["images_per_second"] > 0
    assert result["peak_gib"] > 0


def test_methods_that_need_a_tower_are_refused() -> None:
    with pytest.raises(VLPromptError, match="tpt does not work on features alone"):
        bench_online(method="tpt", classes=5)
