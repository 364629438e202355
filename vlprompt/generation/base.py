"""What every way of learning a concept shares: the host's own denoising loss, and the noise it is measured on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vlprompt.concepts.search import ConceptSearch
from vlprompt.core.seeding import numpy_rng
from vlprompt.generation.hosts import Host
from vlprompt.training.batches import Batch

__all__ = ["NoisedBatches", "Personaliser"]


class Personaliser(ConceptSearch):
    """Base of all ways: something learned becomes the context that the denoiser attends to.

    Args:
        concepts: What is learned.
        host: The frozen model.
        unfreeze: Patterns of the denoiser's parameters that learn too.
    """

    method: str = ""

    def __init__(self, concepts: nn.Module, host: Host, unfreeze: tuple[str, ...] = ()) -> None:
        super().__init__(concepts, host.network, unfreeze)
        self.host = host

    def context(self, template: str | None = None) -> Tensor:
        """Return the (S, d) context of the concept, in a sentence of one's own if there is one."""
        raise NotImplementedError

    def loss(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the host's squared error.

        Args:
            batch: ``latent`` (B, c, h, w), ``noise`` alike, ``time`` (B,).
        """
        count = len(batch["latent"])
        context = self.context().expand(count, -1, -1)
        return {"denoising": self.host.loss(batch["latent"], batch["noise"], batch["time"], context)}


class NoisedBatches:
    """One batch per epoch: every image equally often, each time with noise and a noise level of its own.

    Args:
        latents: (n, c, h, w) of the concept's images.
        batch_size: B.
        seed: Of noise and levels; which depend on (seed, epoch, place in the batch) alone.
        levels: Number of noise levels.
    """

    def __init__(self, latents: Tensor, batch_size: int, seed: int, levels: int = 1000) -> None:
        self.latents, self.batch_size, self.seed, self.levels = latents, batch_size, seed, levels

    def plan(self, epoch: int) -> list[NDArray[np.int64]]:
        """See :meth:`vlprompt.training.batches.Batches.plan`; indices are places in the batch."""
        return [np.arange(self.batch_size)]

    def fetch(self, indices: NDArray[np.int64], epoch: int) -> Batch:
        """See :meth:`vlprompt.training.batches.Batches.fetch`."""
        rngs = [numpy_rng(self.seed, "personalise", epoch, int(i)) for i in indices]
        times = [(i + rng.random()) / self.batch_size for i, rng in zip(indices, rngs, strict=True)]
        shape = tuple(self.latents.shape[1:])
        noise = np.stack([rng.standard_normal(shape, np.float32) for rng in rngs])
        turn = int(numpy_rng(self.seed, "personalise", "turn", epoch).integers(len(self.latents)))
        rows = torch.as_tensor((indices + turn) % len(self.latents))
        return {
            "latent": self.latents[rows],
            "noise": torch.from_numpy(noise),
            "time": torch.tensor(
                [int(t * self.levels) for t in times]
            ),  # stratified: one per B-th of the levels
        }
