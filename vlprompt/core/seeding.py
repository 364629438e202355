"""Every random draw comes from a generator derived from the run's seed and a purpose."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import numpy as np
import torch

__all__ = ["derive_seed", "numpy_rng", "seeded_modules", "torch_rng"]


def derive_seed(seed: int, *purpose: object) -> int:
    """Hash a seed and a purpose into an independent 63-bit seed.

    The result depends on nothing else: not on earlier draws, the process, the platform or the order of calls.

    Args:
        seed: The run's seed.
        purpose: What the draw is for, for example ``("fewshot", "scenes/shape", 16)``; compared by ``str``.
    """
    text = "\x1f".join([str(int(seed)), *map(str, purpose)])
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "little") >> 1


def numpy_rng(seed: int, *purpose: object) -> np.random.Generator:
    """Return a NumPy generator for one purpose (see :func:`derive_seed`)."""
    return np.random.Generator(np.random.PCG64(derive_seed(seed, *purpose)))


def torch_rng(seed: int, *purpose: object) -> torch.Generator:
    """Return a CPU torch generator for one purpose (see :func:`derive_seed`)."""
    return torch.Generator().manual_seed(derive_seed(seed, *purpose))


@contextlib.contextmanager
def seeded_modules(seed: int, *purpose: object) -> Iterator[None]:
    """Give the modules that are built inside PyTorch's default initial values, drawn from a seed and a purpose."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(seed, *purpose))
        yield
