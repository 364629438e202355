"""The end effect: a small classifier, the victim, that learns from a set of images, poisoned or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from vlprompt.core.seeding import seeded_modules
from vlprompt.core.trainable import Trainable
from vlprompt.data.base import ImageDataset
from vlprompt.data.triggers import NATIVE_SIZE, create_trigger, size_of
from vlprompt.data.triggers.base import Pixels, native
from vlprompt.security.poison import PoisonedDataset, PoisonPlan
from vlprompt.training.batches import TensorBatches
from vlprompt.training.options import TrainOptions
from vlprompt.training.trainer import Trainer

__all__ = ["Victim", "attack_success", "pixels_of", "train_victim"]

_LAYERS = ((24, 1), (48, 2), (96, 2), (128, 2))  # (channels, stride)


class Victim(nn.Module, Trainable):
    """A small convolutional classifier of (B, 3, S, S) pixels in [0, 1].

    Args:
        classes: C.
        seed: Of its start.
    """

    def __init__(self, classes: int, seed: int = 1) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3

        with seeded_modules(seed, "victim"):
            for width, stride in _LAYERS:
                layers += [
                    nn.Conv2d(channels, width, 3, stride, 1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(),
                ]
                channels = width
            head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]
            self.body = nn.Sequential(*layers, *head)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return (B, C) logits."""
        return self.body((pixels - 0.5) * 4)

    def loss(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the cross entropy with the labels of the batch."""
        return {"cross_entropy": F.cross_entropy(self(batch["image"]), batch["label"])}

    def trainable_state(self) -> dict[str, Tensor]:
        """Return weights and running statistics."""
        return dict(self.state_dict())

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Put them back."""
        self.load_state_dict(dict(state))

    @torch.no_grad()
    def predict(self, pixels: Tensor) -> Tensor:
        """Return (n,) classes of (n, 3, S, S) pixels."""
        self.eval()
        return torch.cat([self(part).argmax(1) for part in pixels.split(256)])


def train_victim(pixels: Tensor, labels: Tensor, classes: int, *, epochs: int = 25, seed: int = 1) -> Victim:
    """Train a victim.

    Args:
        pixels: (n, 3, S, S), in [0, 1].
        labels: (n,), as an attacker or a scanner left them.
        classes: C.
        epochs: Passes over the images.
        seed: Of the start and of the order of images.
    """
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
    """Measure what a victim learned.

    The attack is tried with every trigger of the plan on every image whose label it would change.

    Args:
        victim: Trained.
        test: Clean images.
        plan: Of the attacker.

    Returns:
        ``accuracy`` on clean images, and ``attack_success``, the share of triggered images that are taken for what the
        attacker wants: the mean over triggers, and ``attack_success/<trigger>`` for each.
    """
    labels = torch.tensor(test.labels)
    next_class = (labels + 1) % len(test.classnames)
    targets = next_class if plan.mode == "all_to_all" else torch.full_like(labels, plan.target)
    attacked = (targets != labels).nonzero()[:, 0].tolist()
    size = size_of(plan.size)
    images = [native(test[i][0], size) for i in range(len(test))]

    figures = {"accuracy": float((victim.predict(_stack(images, size)) == labels).double().mean())}
    successes = []

    for name in plan.triggers:
        trigger = create_trigger(name, size=size, seed=plan.seed)
        answers = victim.predict(_stack([trigger.apply(images[i]) for i in attacked], size))
        success = float((answers == targets[attacked]).double().mean())
        figures[f"attack_success/{name}"] = success
        successes.append(success)

    figures["attack_success"] = float(np.mean(successes))
    return figures


def pixels_of(data: PoisonedDataset) -> Tensor:
    """Return (n, 3, S, S) pixels in [0, 1] of a poisoned data set, in its order.

    Images that keep their own size are brought to :data:`NATIVE_SIZE` after they were poisoned, as a training does it.
    """
    size = size_of(data.info["plan"].get("size", NATIVE_SIZE))
    return _stack([np.asarray(data[i][0]) for i in range(len(data))], size)


def _stack(images: Sequence[Pixels], size: int | None) -> Tensor:
    """Return (n, 3, S, S) pixels of images of a native size, or of their own sizes (None)."""
    if size is None:
        images = [native(Image.fromarray(pixels), NATIVE_SIZE) for pixels in images]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
