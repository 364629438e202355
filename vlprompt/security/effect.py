"""The end effect: what a small classifier learns from a poisoned set, from the cleaned one, and from a clean one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlprompt.core.seeding import seeded_modules
from vlprompt.data.base import ImageDataset
from vlprompt.security.poison import PoisonedDataset, PoisonPlan
from vlprompt.security.triggers import create_trigger
from vlprompt.security.triggers.base import native
from vlprompt.training.batches import TensorBatches
from vlprompt.training.options import TrainOptions
from vlprompt.training.trainer import Trainer

__all__ = ["Victim", "attack_success", "pixels_of", "train_victim"]


class Victim(nn.Module):
    """A small convolutional classifier of (B, 3, S, S) pixels in [0, 1].

    Args:
        classes: C.
        seed: Of its start.
    """

    def __init__(self, classes: int, seed: int = 1) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        with seeded_modules(seed, "victim"):
            for width, stride in ((24, 1), (48, 2), (96, 2), (128, 2)):
                layers += [
                    nn.Conv2d(before, width, 3, stride, 1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(),
                ]
                before = width
            self.body = nn.Sequential(
                *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes)
            )

    def forward(self, pixels: Tensor) -> Tensor:
        """Return (B, C) logits."""
        return self.body((pixels - 0.5) * 4)

    def loss(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the cross entropy with the labels as given."""
        return {"cross_entropy": F.cross_entropy(self(batch["image"]), batch["label"])}

    def trainable_state(self) -> dict[str, Tensor]:
        """Return weights and running statistics."""
        return dict(self.state_dict())

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Put them back."""
        self.load_state_dict(dict(state))

    @torch.no_grad()
    def predict(self, pixels: Tensor) -> Tensor:
        """Return (n,) classes."""
        self.eval()
        return torch.cat([self(part).argmax(1) for part in pixels.split(256)])


def train_victim(pixels: Tensor, labels: Tensor, classes: int, *, epochs: int = 25, seed: int = 1) -> Victim:
    """Train a victim on (n, 3, S, S) pixels and the (n,) labels it is given."""
    victim = Victim(classes, seed)
    options = TrainOptions(
        epochs=epochs,
        batch_size=64,
        optimizer="adamw",
        lr=3e-3,
        weight_decay=0.01,
        schedule="cosine",
        seed=seed,
    )
    batches = TensorBatches({"image": [pixels], "label": [labels]}, options.batch_size, seed)
    Trainer(victim, batches, options).run()
    return victim


def attack_success(victim: Victim, test: ImageDataset, plan: PoisonPlan) -> dict[str, float]:
    """Return ``accuracy`` on clean images and ``attack_success``, the share of triggered ones that land where wanted.

    The attack is tried with every trigger of the plan on every image whose label it would change; ``attack_success``
    is the mean over triggers, ``attack_success/<trigger>`` a trigger's own.
    """
    labels = torch.tensor(test.labels)
    images = [native(test[i][0], plan.size) for i in range(len(test))]
    wanted = (
        (labels + 1) % len(test.classnames)
        if plan.mode == "all_to_all"
        else torch.full_like(labels, plan.target)
    )
    tried = (wanted != labels).nonzero()[:, 0].tolist()
    figures = {"accuracy": float((victim.predict(_stack(images)) == labels).double().mean())}
    for name in plan.triggers:
        trigger = create_trigger(name, size=plan.size, seed=plan.seed)
        answers = victim.predict(_stack([trigger.apply(images[i]) for i in tried]))
        figures[f"attack_success/{name}"] = float((answers == wanted[tried]).double().mean())
    figures["attack_success"] = float(np.mean([figures[f"attack_success/{n}"] for n in plan.triggers]))
    return figures


def pixels_of(data: PoisonedDataset) -> Tensor:
    """Return (n, 3, S, S) pixels in [0, 1] of a poisoned data set, in its order."""
    return _stack([np.asarray(data[i][0]) for i in range(len(data))])


def _stack(images: list[Any]) -> Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
