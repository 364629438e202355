"""A learner as a function of its parameters: what a step inside a step needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vlprompt.core.trainable import Batch
from vlprompt.learners import Learner

__all__ = ["Functional", "prompt_shapes"]


class Functional(nn.Module):
    """A learner whose losses and logits are asked for at other values of its parameters; its own stay untouched.

    Args:
        learner: Not changed.
    """

    def __init__(self, learner: Learner) -> None:
        super().__init__()
        self.learner = learner

    def forward(self, compute: Callable[[Learner], Tensor]) -> Tensor:
        """Compute something of the learner at its present parameters."""
        return compute(self.learner)

    def at(self, theta: Mapping[str, Tensor], compute: Callable[[Learner], Tensor]) -> Tensor:
        """Compute something of the learner at ``theta``.

        An evaluating learner keeps what it computed without gradients until its parameters are loaded anew. It can't
        see that they are others here, so what it kept is dropped before and after.
        """
        self._forget()
        try:
            return functional_call(self, {f"learner.{name}": t for name, t in theta.items()}, (compute,))
        finally:
            self._forget()

    def _forget(self) -> None:
        if not self.learner.training:  # a training one keeps nothing
            self.learner.eval()  # setting the mode drops what was kept

    def loss(self, theta: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Return the sum of the learner's losses at ``theta``."""
        return self.at(theta, lambda learner: torch.stack(list(learner.loss(batch).values())).sum())

    def logits(self, theta: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Return (B, C) logits at ``theta``."""
        return self.at(theta, lambda learner: learner.batch_logits(batch))


def prompt_shapes(learner: nn.Module, names: tuple[str, ...]) -> dict[str, torch.Size]:
    """Return the shapes of the learned parameters that go by one of these names, in whatever module."""
    return {
        name: parameter.shape
        for name, parameter in learner.named_parameters()
        if parameter.requires_grad and name.rpartition(".")[2] in names
    }
