"""The benchmarks of loading run, and what they compare does the same work."""

from __future__ import annotations

import pytest

from benchmarks.evaluate import bench_evaluate
from benchmarks.throughput import bench_throughput
from benchmarks.views import bench_views


def test_views_are_the_same_two_ways() -> None:
    figures = bench_views(backbone="tiny", views=5, images=1, repeats=1)
    assert figures["mean_difference"] < 0.01
    assert figures["speedup"] > 0


@pytest.mark.slow
def test_throughput_and_evaluation_print_a_ratio_for_every_number_of_workers() -> None:
    figures = bench_throughput(
        backbone="tiny", images=12, batch=4, workers="1,2", precisions="fp32", repeats=1
    )
    assert {
        "decode",
        "transfer",
        "encode/fp32",
        "step/fp32",
        "loading_ratio/1",
        "loading_ratio/2",
    } <= figures.keys()

    figures = bench_evaluate(images=12, batch=4, repeats=1)
    assert {"evaluate_ratio", "scan_ratio"} <= figures.keys()
