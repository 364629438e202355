"""Devices, processes and threads: one call for a laptop, a GPU and ``torchrun`` alike."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator, PartialState

from vlprompt.core.shares import lost_process

__all__ = ["accelerator", "divide_threads", "fix_products", "meet", "process_state", "set_threads"]


def accelerator(log_with: str | None = None, project_dir: str | None = None) -> Accelerator:
    """Return accelerate's handle on device and processes.

    Args:
        log_with: A tracker that it is to hand numbers to.
        project_dir: Where that tracker's files go, if it writes some.
    """
    return Accelerator(cpu=_cpu_only(), log_with=log_with, project_dir=project_dir)


def process_state() -> PartialState:
    """Return which process this is; alone, it is the main one."""
    return PartialState(cpu=_cpu_only())


def meet() -> None:
    """Wait until every process of this run is here.

    Raises:
        ProcessLostError: If one is gone.
    """
    try:
        process_state().wait_for_everyone()
    except RuntimeError as error:
        lost = lost_process(error)
        if lost is None:
            raise
        raise lost from error


def divide_threads(processes: int) -> int:
    """Return the threads that each of so many processes gets of those that this one computes with, at least one."""
    return max(1, torch.get_num_threads() // processes)


def set_threads(threads: int) -> None:
    """Let torch use so many threads in this process."""
    torch.set_num_threads(threads)


def fix_products() -> None:
    """Make matrix products independent of the number of threads, if this process computes with several.

    MKL splits a product over threads in a way that changes its last bits; its strict mode does not. It holds from the
    first product in this process on, and in every process that is started from it. What remains dependent is a sum of
    more than 32,768 numbers into one. A value that the user has set is left alone.
    """
    if torch.get_num_threads() > 1:
        widest = "AVX512" if torch.backends.cpu.get_cpu_capability() == "AVX512" else "AVX2"
        os.environ.setdefault("MKL_CBWR", f"{widest},STRICT")


def _cpu_only() -> bool:
    # Without being told so, accelerate takes several processes on a machine without a GPU for unrelated single ones.
    api = getattr(torch, "accelerator", None)
    return not (api.is_available() if api is not None else torch.cuda.is_available())
