"""What a trainer iterates over: which samples make up each global batch, and how a part of one is fetched.

Both are pure functions of (seed, epoch), so any position of a run can be reached without replaying it, and
one process with a batch of 64 sees the same samples as two processes with 32 each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch

from vlprompt.core.seeding import numpy_rng
from vlprompt.core.trainable import Batch

__all__ = ["Batch", "Batches", "Rows", "TensorBatches", "epoch_plan", "prefetch"]


class Batches(Protocol):
    """A source of training batches with random access."""

    def plan(self, epoch: int) -> Sequence[np.ndarray]:
        """Return the sample indices of every global batch of an epoch."""

    def fetch(self, indices: np.ndarray, epoch: int) -> Batch:
        """Return a batch of some samples; must not depend on what was fetched before."""


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


def prefetch(batches: Batches, parts: Sequence[np.ndarray], epoch: int, ahead: int = 2) -> Iterator[Batch]:
    """Yield the batch of every part while a thread reads the next ones.

    Args:
        batches: Where they come from.
        parts: Sample indices of each batch.
        epoch: The epoch they belong to.
        ahead: Batches that are read while one is in use; 0 reads each when it is asked for.
    """
    if isinstance(batches, TensorBatches) or ahead == 0:  # nothing to wait for
        yield from (batches.fetch(part, epoch) for part in parts)
        return

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as pool:
        waiting: list[Future[Batch]] = []

        for part in parts:
            waiting.append(pool.submit(batches.fetch, part, epoch))
            if len(waiting) > ahead:
                yield waiting.pop(0).result()

        for future in waiting:
            yield future.result()
