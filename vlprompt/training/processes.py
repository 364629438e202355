"""Devices and processes, through accelerate: one call for a laptop, a GPU and ``torchrun`` alike."""

from __future__ import annotations

import torch
from accelerate import Accelerator, PartialState

__all__ = ["accelerator", "process_state"]


def accelerator() -> Accelerator:
    """Return accelerate's handle on device and processes."""
    return Accelerator(cpu=_cpu_only())


def process_state() -> PartialState:
    """Return which process this is; alone, it is the main one."""
    return PartialState(cpu=_cpu_only())


def _cpu_only() -> bool:
    # Without being told so, accelerate takes several processes on a machine without a GPU for unrelated single ones.
    api = getattr(torch, "accelerator", None)
    return not (api.is_available() if api is not None else torch.cuda.is_available())
