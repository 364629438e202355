"""What a trainer iterates over: which samples make up each global batch, and how a part of one is fetched.

Both are pure functions of (seed, epoch), so any position of a run can be reached without replaying it, and
one process with a batch of 64 sees the same samples as two processes with 32 each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from vlprompt.core.seeding import numpy_rng
from vlprompt.core.trainable import Batch
from vlprompt.data.loading import Loader

__all__ = ["Batch", "Batches", "ReadBatches", "Rows", "TensorBatches", "batch_loader", "epoch_plan"]


class Batches(Protocol):
    """A source of training batches with random access."""

    def plan(self, epoch: int) -> Sequence[np.ndarray]:
        """Return the sample indices of every global batch of an epoch."""

    def fetch(self, indices: np.ndarray, epoch: int) -> Batch:
        """Return a batch of some samples; must not depend on what was fetched before."""


class ReadBatches(ABC):
    """A source whose batches are read, decoded or drawn, which loading workers can do beside the training."""

    @property
    def reads(self) -> bool:
        """Whether it does so; False if everything is in memory after all."""
        return True

    @abstractmethod
    def plan(self, epoch: int) -> Sequence[np.ndarray]:
        """See :meth:`Batches.plan`."""

    @abstractmethod
    def fetch(self, indices: np.ndarray, epoch: int) -> Batch:
        """See :meth:`Batches.fetch`."""


def epoch_plan(
    samples: int, batch_size: int, seed: int, epoch: int, drop_last: bool = True
) -> list[np.ndarray]:
    """Cut one seeded permutation of ``range(samples)`` into global batches.

    Args:
        samples: Number of training samples.
        batch_size: Samples per global batch.
        seed: The run's seed.
        epoch: Each epoch has its own order.
        drop_last: Drop an incomplete last batch if there is at least one full one.
    """
    order = numpy_rng(seed, "epoch order", epoch).permutation(samples)

    full_batches = samples // batch_size
    end = full_batches * batch_size if drop_last and full_batches else samples

    return [order[start : min(start + batch_size, end)] for start in range(0, end, batch_size)]


class Rows(Protocol):
    """Values of all samples, of which some are taken at a time: a tensor, or something that is read on the way."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: torch.Tensor, /) -> Any: ...


class TensorBatches:
    """Batches cut from tensors that are already in memory, for example cached image features.

    Args:
        tensors: Name to a list of V views, each a tensor (or :class:`Rows`) whose first axis is the sample; epoch e
            uses view e mod V.
        batch_size: Samples per global batch.
        seed: The run's seed.
        drop_last: See :func:`epoch_plan`.
    """

    def __init__(
        self, tensors: Mapping[str, Sequence[Rows]], batch_size: int, seed: int, drop_last: bool = True
    ) -> None:
        self.tensors = tensors
        self.batch_size = batch_size
        self.seed = seed
        self.drop_last = drop_last
        self.samples = len(next(iter(tensors.values()))[0])

    def plan(self, epoch: int) -> list[np.ndarray]:
        """See :meth:`Batches.plan`."""
        return epoch_plan(self.samples, self.batch_size, self.seed, epoch, self.drop_last)

    def fetch(self, indices: np.ndarray, epoch: int) -> Batch:
        """See :meth:`Batches.fetch`; adds the sample numbers as ``"index"``."""
        index = torch.as_tensor(indices)
        batch: Batch = {name: views[epoch % len(views)][index] for name, views in self.tensors.items()}
        return {**batch, "index": index}


@dataclass(frozen=True)
class _Fetch:
    """Fetches one part of an epoch."""

    batches: Batches

    def __call__(self, item: tuple[np.ndarray, int]) -> Batch:
        """Return the batch of (sample indices, epoch)."""
        return self.batches.fetch(*item)


def batch_loader(
    batches: Batches, expected: int = 0, pin: bool = False
) -> Loader[tuple[np.ndarray, int], Batch]:
    """Return what loads batches; its items are (sample indices, epoch).

    Args:
        batches: Where they come from.
        expected: Batches that will be asked for in all.
        pin: See :class:`vlprompt.data.loading.Loader`.
    """
    workers = None if isinstance(batches, ReadBatches) and batches.reads else 0
    return Loader(_Fetch(batches), workers=workers, expected=expected, pin=pin)
