"""Benchmarks take turns with the baseline, say when the machine is not quiet, and never take half of its memory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from benchmarks.machine import MemoryNeedError, Noise, NoiseWatch, memory_limit, require_memory
from benchmarks.measure import Aside, Measured, Turns, in_turns, measure

TOOLS = Path(__file__).parents[3] / "tools"


def test_ways_take_turns() -> None:
    runs: list[str] = []
    found = in_turns({name: partial(runs.append, name) for name in "abc"}, repeats=3, warmup=1)
    assert "".join(runs) == "abc" + "abc" + "cba" + "abc"
    assert {name: len(times) for name, times in found.runs.items()} == {"a": 3, "b": 3, "c": 3}


def test_a_ratio_is_the_median_of_the_rounds() -> None:
    runs = {
        "ours": [Measured(wall, cpu, None, None) for wall, cpu in ((1.0, 2.0), (2.0, 3.0), (4.0, 1.0))],
        "theirs": [Measured(wall, cpu, None, None) for wall, cpu in ((5.0, 6.0), (4.0, 3.0), (16.0, 2.0))],
    }
    turns = Turns(runs, quiet=True)
    assert (turns.ratio("theirs", "ours"), turns.cpu_ratio("theirs", "ours")) == (4.0, 2.0)
    assert turns["ours"].seconds == 2.0


def test_what_a_run_did_aside_is_taken_off() -> None:
    def work() -> Aside:
        aside = Aside()
        with aside.running():
            time.sleep(0.2)
        return aside

    found = measure(work, repeats=1, warmup=0)
    assert found.seconds < 0.2


def test_memory_that_a_run_adds_and_its_page_faults_are_seen() -> None:
    size = 64 << 20
    found = measure(lambda: bytearray(os.urandom(1) * size), repeats=1, warmup=0)
    assert found.added_gib is not None
    assert found.added_gib > 0.9 * size / 2**30
    assert found.page_faults > 0
    assert measure(lambda: None, repeats=1).page_faults < found.page_faults


def test_work_of_other_processes_is_noise_and_that_of_this_one_is_not() -> None:
    watch = NoiseWatch()
    end = time.perf_counter() + 0.6
    while time.perf_counter() < end:
        pass
    alone = watch.noise()
    if alone is None:
        pytest.skip("the system does not tell what its processors do")

    watch = NoiseWatch()
    spin = "import time; end = time.perf_counter() + 0.8\nwhile time.perf_counter() < end: pass"
    with subprocess.Popen([sys.executable, "-c", spin]):
        time.sleep(0.7)
        beside = watch.noise()
    assert beside is not None
    assert beside.others > 0.3


def test_what_is_not_quiet_says_so() -> None:
    assert Noise(others=0.05, stolen=0.02, seconds=2.0).quiet
    assert not Noise(others=0.9, stolen=0.0, seconds=2.0).quiet
    assert not Noise(others=0.0, stolen=0.4, seconds=2.0).quiet
    assert Noise(others=0.9, stolen=0.0, seconds=0.1).quiet  # too short to tell
    assert "0.90 processors" in Noise(others=0.9, stolen=0.0, seconds=2.0).warning()


def test_more_than_half_of_the_memory_is_refused_before_it_is_taken() -> None:
    require_memory(memory_limit(), "this", "Do less.")
    with pytest.raises(MemoryNeedError, match=r"this needs about .* GiB.*Do less\."):
        require_memory(memory_limit() + 1, "this", "Do less.")


def test_a_benchmark_that_grows_too_large_is_stopped() -> None:
    code = (
        "import time\nfrom benchmarks import machine\nmachine.memory_limit = lambda: 64 << 20\n"
        "with machine.bounded_memory():\n    kept = bytearray(200 << 20)\n    kept[:] = b'x' * len(kept)\n"
        "    time.sleep(5)\nprint('never')"
    )
    environment = {**os.environ, "PYTHONPATH": f"{TOOLS}{os.pathsep}{TOOLS.parent}"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert found.returncode == 2
    assert found.stderr.startswith("error: stopped at ")
    assert "never" not in found.stdout
