"""R4: the task's gradient plus a gated share of a second one, which holds prompts near the frozen model.

After ProMetaR (Park et al., CVPR 2024, arXiv 2404.00851) and its authors' code: the gate is two linear layers without
anything between them, one gate per layer and modality, a value for every eight numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vlprompt.core.errors import DataError
from vlprompt.core.seeding import seeded_modules
from vlprompt.learners import Learner
from vlprompt.meta.regulators import REGULATORS, Regulator, Situation, key_of

__all__ = ["TwoGradients"]


@REGULATORS.register(
    "two_gradients",
    summary="R4: the task's gradient and a gated one towards the frozen model",
    paper="2404.00851",
)
class TwoGradients(Regulator):
    """R(g) = g + gamma(g, h) * h, where h is the gradient of the distance to the frozen model's features.

    The distance is the mean absolute difference of text features times ``text_weight``, plus that of image features
    times ``image_weight``, each where the learner's prompts touch that side.

    Args:
        shapes: See :class:`Regulator`.
        dim: See there.
        share: Numbers that share a value of gamma.
        text_weight: See above.
        image_weight: See above.
        seed: Of the start.
    """

    needs_general = True

    def __init__(
        self,
        shapes: Mapping[str, torch.Size],
        dim: int,
        *,
        share: Annotated[int, Field(ge=1)] = 8,
        text_weight: Annotated[float, Field(ge=0)] = 50.0,
        image_weight: Annotated[float, Field(ge=0)] = 20.0,
        seed: int = 1,
    ) -> None:
        super().__init__(shapes, dim)
        self.share = share
        self.text_weight = text_weight
        self.image_weight = image_weight

        with seeded_modules(seed, "two gradients"):
            self.gates = nn.ModuleDict(
                {
                    key_of(n): nn.ModuleList(_gate(_layer_size(s), share) for _ in range(_layers(s)))
                    for n, s in shapes.items()
                }
            )

    def distance(self, learner: Learner, batch: Mapping[str, Tensor]) -> Tensor:
        """See :meth:`Regulator.distance`."""
        texts = F.l1_loss(learner.class_weights(), _frozen_weights(learner))
        if "image" not in batch or learner.static_images:
            return self.text_weight * texts

        images = F.normalize(learner.embed_images(batch["image"]), dim=-1)
        apart = F.l1_loss(images, learner.backbone.encode_image(batch["image"]))
        return self.text_weight * texts + self.image_weight * apart

    def regulate_one(self, name: str, gradient: Tensor, situation: Situation) -> Tensor:
        """See :meth:`Regulator.regulate_one`."""
        if situation.general is None:
            raise DataError("the regulator 'two_gradients' needs a second gradient, and none was given.")

        shape = self.shapes[name]
        first = gradient.reshape(_layers(shape), -1)
        second = situation.general[name].to(gradient.dtype).reshape(_layers(shape), -1)

        gates: nn.ModuleList = self.gates[key_of(name)]  # type: ignore[assignment]
        gamma = torch.stack(
            [gate(torch.cat([a, b])) for gate, a, b in zip(gates, first, second, strict=True)]
        )
        gamma = gamma.sigmoid().repeat_interleave(self.share, dim=-1)[:, : first.shape[1]]
        return (first + gamma * second).view(shape)


def _frozen_weights(learner: Learner) -> Tensor:
    """Return the (C, d) zero-shot weights of a learner's classes, computed once."""
    weights = learner.__dict__.get("_frozen_weights")
    if weights is None:
        weights = learner.backbone.class_weights(learner.classnames, learner.templates)
        learner.__dict__["_frozen_weights"] = weights  # past nn.Module, which would register it
    return weights


def _layers(shape: torch.Size) -> int:
    return shape[0] if len(shape) > 2 else 1


def _layer_size(shape: torch.Size) -> int:
    return shape[-1] * shape[-2]


def _gate(size: int, share: int) -> nn.Sequential:
    values = -(-size // share)
    return nn.Sequential(nn.Linear(2 * size, values), nn.Linear(values, values, bias=False))
