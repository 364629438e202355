"""Training with a frozen regulator on the gradients.

The trainer applies the regulator to whole-batch float32 gradients, unscaled and clipped, right before the optimiser.
That is the model-agnostic use of "Gradient-Regulated Meta-Prompt Learning" (ICCV 2023, arXiv 2303.06571); where
exactly the regulator acts is our choice.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vlprompt.core.errors import DataError
from vlprompt.core.trainable import Batch, Trainable, TransparentWrapper
from vlprompt.learners import Learner
from vlprompt.meta.regulators import Regulator, Situation
from vlprompt.meta.start import GramStart

__all__ = ["Regulated", "regulated"]


class Regulated(TransparentWrapper):
    """A learner, or several tasks' one, whose gradients pass a frozen regulator.

    Args:
        learner: Already started, see :meth:`GramStart.put_into`.
        regulator: Frozen.
        features: (d,) mean unit-length image feature of the training samples, if the regulator reads it.
        module: What the trainer would train without a regulator, if it is not the learner itself.

    Raises:
        DataError: If the regulator needs a second gradient and what is trained can't give it.
    """

    def __init__(
        self,
        learner: Learner,
        regulator: Regulator,
        features: Tensor | None = None,
        module: Trainable | None = None,
    ) -> None:
        if regulator.needs_general and (module is not None or learner.combines_gradients):
            what = (
                "several tasks together"
                if module is not None
                else f"{learner.method}, which combines gradients,"
            )
            raise DataError(
                f"the regulator {regulator.method!r} needs two gradients of one learner; {what} can't give them. Use "
                "another regulator (diagonal, low_rank, gated)."
            )

        device = learner.backbone.device
        self.learner = learner
        self.module = module or learner
        self.regulator = regulator.to(device)
        self.features = None if features is None else features.to(device)
        self._general: dict[str, Tensor] = {}  # the second gradient of the present step

    @property
    def wrapped(self) -> Trainable:
        """See :attr:`Wrapper.wrapped`."""
        return self.module

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return the learner's losses; with a two-gradient regulator also the distance to the frozen model."""
        losses = self.module.loss(batch)
        if self.regulator.needs_general:
            losses = {**losses, "distance": self.regulator.distance(self.learner, batch)}
        return losses

    @property
    def combines_gradients(self) -> bool:
        """See :attr:`Hooks.combines_gradients`: also if the regulator reads a second gradient."""
        return self.regulator.needs_general or self.module.combines_gradients

    def combine_gradients(self, gradients: Mapping[str, Sequence[Tensor]]) -> list[Tensor]:
        """Set the second gradient aside for :meth:`transform_gradients`, and combine the others."""
        if not self.regulator.needs_general:
            return self.module.combine_gradients(gradients)

        self._general = dict(zip(self.learned_parameters(), gradients["distance"], strict=True))
        rest = {name: parts for name, parts in gradients.items() if name != "distance"}
        return self.module.combine_gradients(rest)

    def transform_gradients(self, gradients: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Regulate what the optimiser is about to read, after what the module itself makes of it."""
        changed = {**gradients, **self.module.transform_gradients(gradients)}
        with torch.no_grad():
            return self.regulator(changed, Situation(self.features, self._general or None))


def regulated(
    learner: Learner,
    start: GramStart | None,
    features: Callable[[], Tensor],
    optimizer: str,
    module: Trainable | None = None,
) -> Trainable:
    """Return what to train: the learner with the start's regulator on its gradients.

    Args:
        learner: Already started.
        start: Where the regulator comes from; None leaves everything as it is.
        features: Returns (n, d) image features of the training samples; only called if the regulator reads them.
        optimizer: Name of the rule behind the regulator; Adam takes positive factors back, which is warned of.
        module: See :class:`Regulated`.
    """
    if start is None:
        return module or learner

    regulator = start.regulator
    if optimizer != "sgd" and regulator.only_scales:
        warnings.warn(
            f"Adam divides every number by its own size, so the factors of the regulator {regulator.method!r} cancel "
            "but for their sign: use train.optimizer=sgd with it.",
            stacklevel=3,
        )

    mean = None
    if regulator.needs_features:
        mean = F.normalize(F.normalize(features(), dim=-1).mean(0), dim=-1)
    return Regulated(learner, regulator, mean, module)
