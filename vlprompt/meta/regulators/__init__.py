"""Regulators: small functions that turn a gradient of prompts into one that serves other domains too.

One file per form, discovered. The paper calls its function lightweight and says no more that could be checked; the
forms are ours or, where a file says so, follow relatives with public code. ``identity`` is the ablation that makes GRAM
plain first-order MAML. Fine-tuning applies a regulator between the backward pass and the optimiser's step, frozen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlprompt.core.errors import ConfigError
from vlprompt.core.options import check_options
from vlprompt.core.registry import Registry
from vlprompt.learners import Learner

__all__ = ["PROMPTS", "REGULATORS", "Regulator", "Situation", "create_regulator", "key_of"]

REGULATORS: Registry[type[Regulator]] = Registry("regulator", "vlprompt.meta.regulators")
"""Every regulator by name."""

PROMPTS = ("context", "deep_context", "visual")
"""What learners call their prompts. Other parameters (couplings, mixers) are none: their gradients pass unchanged."""


@dataclass(frozen=True)
class Situation:
    """What a regulator may know beside the gradients.

    Attributes:
        features: (d,) mean unit-length image feature of the samples the gradients come from; None if not asked for.
        general: Gradients of what holds prompts near the frozen model, by name; None if they weren't asked for.
    """

    features: Tensor | None = None
    general: Mapping[str, Tensor] | None = None


class Regulator(nn.Module):
    """Base of all forms. A form defines :meth:`regulate_one` or :meth:`regulate`.

    Args:
        shapes: Name to shape of the prompts it is made for: (M, W), or (J, M, W) for J layers.
        dim: d, of the joint space.

    Attributes:
        needs_features: Whether it reads :attr:`Situation.features`.
        needs_general: Whether it reads :attr:`Situation.general`.
        only_scales: Whether every number is multiplied by a positive one at most, which the element-wise normaliser of
            Adam takes back.
        method: Its registry name.
        options: The options it was built with.
    """

    needs_features: bool = False
    needs_general: bool = False
    only_scales: bool = False
    method: str = ""
    options: dict[str, Any]

    def __init__(self, shapes: Mapping[str, torch.Size], dim: int) -> None:
        super().__init__()
        self.shapes = {name: torch.Size(shape) for name, shape in shapes.items()}
        self.dim = dim
        self.bound: float | None = None

    def forward(self, gradients: Mapping[str, Tensor], situation: Situation) -> dict[str, Tensor]:
        """Return regulated gradients in full precision; names it wasn't made for pass unchanged."""
        plain = {name: _full(gradient) for name, gradient in gradients.items() if name in self.shapes}

        regulated = dict(gradients)
        for name, gradient in self.regulate(plain, situation).items():
            regulated[name] = gradient if self.bound is None else _bounded(gradient, plain[name], self.bound)
        return regulated

    def regulate(self, gradients: Mapping[str, Tensor], situation: Situation) -> dict[str, Tensor]:
        """Regulate all gradients it was made for."""
        return {name: self.regulate_one(name, g, situation) for name, g in gradients.items()}

    def regulate_one(self, name: str, gradient: Tensor, situation: Situation) -> Tensor:
        """Regulate one gradient; the shape stays."""
        raise NotImplementedError

    def distance(self, learner: Learner, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the loss whose gradients are :attr:`Situation.general`."""
        raise NotImplementedError

    def auxiliary(
        self,
        regulated: Mapping[str, Tensor],
        query: Mapping[str, Tensor],
        similarity: float,
        situation: Situation,
    ) -> Tensor | None:
        """Return a further meta-training loss, or None.

        Args:
            regulated: The support's regulated gradients.
            query: The query's gradients behind the inner step, constants.
            similarity: Cosine of the two domains' centres.
            situation: As it was for the support.
        """
        return None


def create_regulator(
    name: str, shapes: Mapping[str, torch.Size], dim: int, *, bound: float | None = None, **options: Any
) -> Regulator:
    """Build a regulator.

    Args:
        name: One of ``REGULATORS.names()``.
        shapes: See :class:`Regulator`.
        dim: See there.
        bound: b > 1 keeps |R(g)| / |g| within [1 / b, b], tensor by tensor; None doesn't.
        **options: The form's own.

    Raises:
        UnknownNameError: For an unknown name.
        ConfigError: For options it doesn't have, all at once.
    """
    entry = REGULATORS.get(name)
    checked = check_options(entry.target, options, f"regulator {name!r}")
    if bound is not None and not bound > 1:
        raise ConfigError([f"bound: must be above 1, got {bound}."], f"regulator {name!r}")

    regulator = entry.target(shapes, dim, **checked)
    regulator.method = name
    regulator.bound = bound
    regulator.options = {**checked, **({} if bound is None else {"bound": bound})}
    return regulator


def key_of(name: str) -> str:
    """Return a parameter's name as a key of torch's containers, which take no dots."""
    return name.replace(".", "-")


def _full(gradient: Tensor) -> Tensor:
    return gradient.float() if gradient.element_size() < 4 else gradient


def _bounded(regulated: Tensor, gradient: Tensor, bound: float) -> Tensor:
    ratio = regulated.norm() / gradient.norm().clamp(min=1e-30)
    return regulated * (ratio.clamp(1 / bound, bound) / ratio.clamp(min=1e-30)).detach()
