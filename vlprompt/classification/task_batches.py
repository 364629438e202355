"""Batches that mix several tasks in chosen proportions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vlprompt.backbones.vision import Images, TokenStates
from vlprompt.core.seeding import numpy_rng
from vlprompt.training.batches import Batch, Batches, ReadBatches, epoch_plan

__all__ = ["MultiTaskBatches", "task_quotas"]


def task_quotas(sizes: Sequence[int], exponent: float) -> list[int]:
    """Return how many samples of each task an epoch takes; together as many as there are.

    Args:
        sizes: Training samples per task.
        exponent: alpha in the share n^alpha: 1 takes every sample once, 0 the same number of each task. Rounded by
            largest remainder.
    """
    weights = np.asarray(sizes, dtype=float) ** exponent
    exact = sum(sizes) * weights / weights.sum()

    quotas = np.floor(exact + 1e-9).astype(int)
    order = np.argsort(quotas - exact, kind="stable")
    quotas[order[: sum(sizes) - quotas.sum()]] += 1

    return quotas.tolist()


class MultiTaskBatches(ReadBatches):
    """Batches that mix tasks, with random access like every other kind.

    Args:
        sources: One source of batches per task.
        sizes: Training samples per task.
        exponent: See :func:`task_quotas`.
        batch_size: Samples per global batch.
        seed: The run's seed.
        drop_last: See :func:`epoch_plan`.
    """

    def __init__(
        self,
        sources: Sequence[Batches],
        sizes: Sequence[int],
        exponent: float,
        batch_size: int,
        seed: int,
        drop_last: bool = True,
    ) -> None:
        self.sources = list(sources)
        self.sizes = list(sizes)
        self.batch_size = batch_size
        self.seed = seed
        self.drop_last = drop_last
        self.quotas = task_quotas(sizes, exponent)
        self.starts = np.cumsum([0, *sizes])

    @property
    def reads(self) -> bool:
        """See :attr:`vlprompt.training.batches.ReadBatches.reads`."""
        return any(isinstance(source, ReadBatches) and source.reads for source in self.sources)

    def plan(self, epoch: int) -> list[np.ndarray]:
        """See :meth:`vlprompt.training.batches.Batches.plan`; a sample's number counts through all tasks."""
        samples = np.concatenate([self._draw(task, epoch) for task in range(len(self.sizes))])
        parts = epoch_plan(len(samples), self.batch_size, self.seed, epoch, self.drop_last)
        return [samples[part] for part in parts]

    def fetch(self, indices: np.ndarray, epoch: int) -> Batch:
        """See :meth:`vlprompt.training.batches.Batches.fetch`; samples come ordered by ``"task"``."""
        task_of = np.searchsorted(self.starts, indices, side="right") - 1

        parts = []
        for task in np.unique(task_of):
            part = self.sources[task].fetch(indices[task_of == task] - self.starts[task], epoch)
            count = len(part["label"])
            parts.append({**part, "task": torch.full((count,), int(task))})

        batch: Batch = {name: _joined([part[name] for part in parts]) for name in parts[0]}
        return {**batch, "index": torch.as_tensor(indices[np.argsort(task_of, kind="stable")])}

    def _draw(self, task: int, epoch: int) -> np.ndarray:
        """Return this epoch's samples of a task; none comes a second time before all came once."""
        size = self.sizes[task]
        quota = self.quotas[task]

        passes = [
            numpy_rng(self.seed, "task order", epoch, task, number).permutation(size)
            for number in range(-(-quota // size))
        ]
        samples = np.concatenate(passes)[:quota] if passes else np.empty(0, dtype=int)
        return self.starts[task] + samples


def _joined(parts: Sequence[Images]) -> Images:
    """Return the values of several tasks' samples, one after the other."""
    states = [part for part in parts if isinstance(part, TokenStates)]
    return (
        TokenStates.cat(states)
        if states
        else torch.cat([part for part in parts if isinstance(part, torch.Tensor)])
    )
