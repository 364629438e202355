"""What all methods of learning a concept share: the host's own denoising loss, and the noise it is measured on."""

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
    """Base of all methods: what is learned becomes the context that the denoiser attends to.

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
        """Return the (S, d) context of the concept.

        Args:
            template: A sentence with one ``*`` to put it in; None: the one it is learned with.
        """
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
        seed: Of noise and levels; they depend on (seed, epoch, position in the batch) alone.
        levels: Number of noise levels.
    """

    def __init__(self, latents: Tensor, batch_size: int, seed: int, levels: int = 1000) -> None:
        self.latents = latents
        self.batch_size = batch_size
        self.seed = seed
        self.levels = levels

    def plan(self, epoch: int) -> list[NDArray[np.int64]]:
        """See :meth:`vlprompt.training.batches.Batches.plan`; indices are positions in the batch."""
        return [np.arange(self.batch_size)]

    def fetch(self, indices: NDArray[np.int64], epoch: int) -> Batch:
        """See :meth:`vlprompt.training.batches.Batches.fetch`."""
        noises = []
        levels = []
        shape = tuple(self.latents.shape[1:])

        for index in indices:
            rng = numpy_rng(self.seed, "personalise", epoch, int(index))
            # Stratified: the i-th sample of a batch has a level of the i-th part of all levels.
            level = (index + rng.random()) / self.batch_size
            levels.append(int(level * self.levels))
            noises.append(rng.standard_normal(shape, np.float32))

        # The first image of a batch changes from step to step, so that every image meets every level.
        turn = int(numpy_rng(self.seed, "personalise", "turn", epoch).integers(len(self.latents)))
        rows = torch.as_tensor((indices + turn) % len(self.latents))
        return {
            "latent": self.latents[rows],
            "noise": torch.from_numpy(np.stack(noises)),
            "time": torch.tensor(levels),
        }
