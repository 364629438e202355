"""Values that any machine and any library version can make again: golden files need not store weights.

A tensor is filled from its name alone: the name's SHA-256 seeds PCG64, whose raw 64-bit stream never changes
between NumPy versions; 16 bits of it make one value, uniform around ``mean`` with standard deviation ``std``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["clip_state", "filled"]


def filled(name: str, shape: Sequence[int], std: float, mean: float = 0.0) -> Tensor:
    """Return a float32 tensor of ``shape`` that depends on nothing but the arguments."""
    count = math.prod(shape)
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    words = np.random.PCG64(seed).random_raw(-(-count // 4)).astype("<u8")
    values = words.view("<u2")[:count].astype(np.float32)
    step = np.float32(std * math.sqrt(12) / 65536)
    return torch.from_numpy((values - np.float32(32767.5)) * step + np.float32(mean)).reshape(tuple(shape))


def clip_state(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Fill an OpenAI-layout CLIP, given every tensor's shape by name; activations are of ordinary size."""
    return {n: _tensor(n, tuple(s)) for n, s in sorted(shapes.items())}


def _tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    if name == "logit_scale":
        return torch.tensor(math.log(100.0))
    parent, last = name.rsplit(".", 1) if "." in name else ("", name)
    if "ln_" in parent:
        return filled(name, shape, 0.1, mean=1.0 if last == "weight" else 0.0)
    if "embedding" in name or "bias" in last:
        return filled(name, shape, 0.02)
    fan_in = shape[0] if last in ("proj", "text_projection") else math.prod(shape[1:])
    return filled(name, shape, fan_in**-0.5)
