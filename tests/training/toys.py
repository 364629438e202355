"""A small learnable problem and the data that teach it, for tests of the trainer alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlprompt.core.trainable import Trainable
from vlprompt.training.batches import TensorBatches
from vlprompt.training.options import TrainOptions


class ToyModule(nn.Module, Trainable):
    """A two-layer classifier with dropout, so that a resume that misses random state shows."""

    def __init__(self, dropout: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first = nn.Parameter(0.3 * torch.randn(6, 8, generator=generator))
        self.second = nn.Parameter(0.3 * torch.randn(8, 3, generator=generator))
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(torch.tanh(x @ self.first), self.dropout, self.training) @ self.second

    def loss(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            "fit": F.cross_entropy(self(batch["x"]), batch["label"]),
            "size": 1e-3 * self.first.square().sum(),
        }

    def trainable_state(self) -> dict[str, Tensor]:
        return {n: p.detach() for n, p in self.named_parameters()}

    def load_trainable_state(self, state: dict[str, Tensor]) -> None:
        self.load_state_dict(state)


def toy_batches(options: TrainOptions, samples: int = 50) -> TensorBatches:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(samples, 6, generator=generator)
    label = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    return TensorBatches({"x": [x], "label": [label]}, options.batch_size, options.seed, options.drop_last)
