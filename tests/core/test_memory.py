"""Memory that was freed is kept for the next batch, unless the user says otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from vlprompt.core.memory import SWITCH, keep_freed_memory

PROGRAM = """
import resource
from vlprompt.core.memory import keep_freed_memory
import torch
kept = keep_freed_memory()
for number in range(40):  # the heap grows at first: an aligned block needs a hole a little larger than itself
    if number == 30:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(9 << 20)  # 36 MiB
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(setting: str) -> tuple[bool, int]:
    environment = {**os.environ, SWITCH: setting, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    kept, count = done.stdout.split()
    return kept == "True", int(count)


def test_large_buffers_are_not_fetched_from_the_system_again() -> None:
    if not keep_freed_memory():
        pytest.skip("this system has no glibc")
    kept, few = faults("")
    left, many = faults("system")
    assert (kept, left) == (True, False)
    assert many > 10 * (36 // 2 - 2)  # at least one per huge page, ten times
    assert few < many / 10
