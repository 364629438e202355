"""Devices, processes and threads: one call for a laptop, a GPU and ``torchrun`` alike."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator, PartialState

__all__ = ["accelerator", "divide_threads", "process_state", "set_threads"]


def accelerator() -> Accelerator:
    """Return accelerate's handle on device and processes."""
    return Accelerator(cpu=_cpu_only())


def process_state() -> PartialState:
    """Return which process this is; alone, it is the main one."""
    return PartialState(cpu=_cpu_only())


def divide_threads(processes: int) -> int:
    """Return the threads that each of so many processes gets of this machine's cores, at least one."""
    # A container or a batch system may allow fewer cores than the machine has.
    allowed = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if allowed else os.cpu_count() or 1
    return max(1, cores // processes)


def set_threads(threads: int) -> None:
    """Let torch use so many threads in this process."""
    torch.set_num_threads(threads)


def _cpu_only() -> bool:
    # Without being told so, accelerate takes several processes on a machine without a GPU for unrelated single ones.
    api = getattr(torch, "accelerator", None)
    return not (api.is_available() if api is not None else torch.cuda.is_available())
