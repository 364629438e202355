"""What the trainer asks of whatever it trains: losses, learned tensors, and hooks that do nothing by default.

Every optional behaviour is a method of :class:`Hooks`. A class overrides those it needs, and the trainer calls all of
them. :class:`Wrapper` is the base of everything that trains another trainable in its own way: each method that a
wrapper does not define is forwarded, also one that is added here later.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from vlprompt.core.errors import CheckpointError
from vlprompt.core.precision import Precision

__all__ = [
    "Batch",
    "Hooks",
    "OwnRate",
    "ParameterGroup",
    "Phase",
    "Trainable",
    "TransparentWrapper",
    "Wrapper",
    "forward_all",
    "groups_by_rate",
    "misfits",
]

Batch = dict[str, Any]
"""Tensors by name with the samples along the first axis; a task may add lists of strings and the like."""


class ParameterGroup(TypedDict, total=False):
    """Parameters that the optimiser treats alike.

    Attributes:
        names: Names of learned parameters. All groups together name every learned parameter once.
        rate: Multiple of the run's learning rate; 1 if it is left out.
        weight_decay: Replaces ``train.weight_decay``.
    """

    names: list[str]
    rate: float
    weight_decay: float


class OwnRate:
    """A part of a learner, a module, whose parameters learn at a multiple of the run's learning rate.

    Attributes:
        rate: The multiple.
    """

    rate: float = 1.0


def groups_by_rate(module: nn.Module) -> list[ParameterGroup]:
    """Return the groups of a module whose parts have rates of their own; empty if none has."""
    rates = {
        f"{name}." if name else "": part.rate
        for name, part in module.named_modules()
        if isinstance(part, OwnRate)
    }
    if not rates:
        return []

    groups: dict[float, list[str]] = {1.0: []}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            rate = next((rate for prefix, rate in rates.items() if name.startswith(prefix)), 1.0)
            groups.setdefault(rate, []).append(name)
    plain: list[ParameterGroup] = [{"names": groups.pop(1.0)}]
    with_rate: list[ParameterGroup] = [{"names": names, "rate": rate} for rate, names in groups.items()]
    return [group for group in plain + with_rate if group["names"]]


@dataclass(frozen=True)
class Phase:
    """A part of a run that trains some of the parameters, with an optimiser and a schedule of its own.

    Attributes:
        names: Names of the learned parameters that move; the others keep still.
        share: Of the run's optimiser steps, rounded down at the border; the last phase has the rest.
    """

    names: tuple[str, ...]
    share: float


class Hooks:
    """The optional methods: each does nothing, or what the trainer would do without it."""

    @property
    def precision(self) -> Precision:
        """What frozen parts compute in. Under ``fp16`` the trainer scales losses, so that no gradient vanishes."""
        return "fp32"

    @property
    def combines_gradients(self) -> bool:
        """Whether :meth:`combine_gradients` makes the update's gradient.

        If so, the trainer computes the gradient of every loss separately, one backward pass per loss. A class that
        overrides :meth:`combine_gradients` says so by ``combines_gradients = True``.
        """
        return False

    @property
    def divides_classes(self) -> bool:
        """Whether the sentences that a step encodes are the same whatever its samples are.

        If so, several processes may divide the classes of a training step among them. A class of which that is true
        says so by ``divides_classes = True``.
        """
        return False

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return the optimiser's groups; empty means one group of all that learns. Called when the trainer is built."""
        return []

    def phases(self) -> list[Phase]:
        """Return the phases of a run, in their order; empty means one phase of all that learns.

        Called when the trainer is built. No parameter may belong to two phases.
        """
        return []

    def enter_phase(self, number: int, is_new: bool) -> None:
        """Act before the first step that a trainer takes in a phase.

        Args:
            number: Of the phase, from 0; without phases there is one.
            is_new: Whether this step is the phase's first; False where a run goes on in its middle.
        """

    def combine_gradients(self, gradients: Mapping[str, Sequence[Tensor]]) -> list[Tensor]:
        """Make the update's gradient out of the gradients of all losses; only called if ``combines_gradients``.

        Args:
            gradients: Name of a loss to its gradients, in the order of the learned parameters. They belong to the
                whole batch, over all processes, and are unscaled.

        Returns:
            One gradient per learned parameter, in the same order; here their sum.
        """
        return [torch.stack(list(parts)).sum(0) for parts in zip(*gradients.values(), strict=True)]

    def transform_gradients(self, gradients: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Change what the optimiser is about to read; called once per step.

        Args:
            gradients: Parameter's name to its gradient: of the whole batch, unscaled and clipped.

        Returns:
            Gradients by name; a name that is left out keeps its gradient.
        """
        return gradients

    def after_epoch(self, epoch: int, epochs: int) -> None:
        """Act at the end of an epoch, before validation.

        Args:
            epoch: The epoch that ended, in [0, epochs).
            epochs: Epochs of the whole run.
        """

    def after_training(self) -> None:
        """Act after the last epoch, before the best weights are put back (if the run selects them)."""

    def running_state(self) -> dict[str, Tensor]:
        """Return tensors beside :meth:`trainable_state` that a run needs to continue from a checkpoint."""
        return {}

    def load_running_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`running_state` returned."""


class Trainable(Hooks):
    """Base of everything that learns.

    A subclass is usually also a :class:`torch.nn.Module`, which then comes first among its bases, so that
    ``named_parameters`` and ``train`` are the module's.
    """

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return named scalar losses, each a mean over the batch's samples; the trainer minimises their sum."""
        raise NotImplementedError

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """See :meth:`torch.nn.Module.named_parameters`."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> Any:
        """See :meth:`torch.nn.Module.train`."""
        raise NotImplementedError

    def learned_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that take gradients, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def num_trainable(self) -> int:
        """Return how many numbers take gradients."""
        return sum(parameter.numel() for parameter in self.learned_parameters().values())

    def trainable_state(self) -> dict[str, Tensor]:
        """Return what is learned, by name, and nothing else."""
        return {name: parameter.detach() for name, parameter in self.learned_parameters().items()}

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Put learned tensors back.

        Raises:
            CheckpointError: If a tensor is missing, unknown, of another shape or type, or not finite; each is named.
        """
        parameters = self.learned_parameters()

        problems = misfits(parameters, state)
        if problems:
            raise CheckpointError(f"this state does not fit {self.title()}: {'; '.join(problems)}.")

        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(state[name])

    def title(self) -> str:
        """Return what messages call it."""
        return type(self).__name__


class Wrapper(Trainable):
    """A trainable around another one: each hook that it does not define itself is the other one's.

    The hooks are found by looking at :class:`Hooks`, so a hook that is added there is forwarded without an edit here.
    """

    @property
    def wrapped(self) -> Trainable:
        """The trainable inside."""
        raise NotImplementedError


class TransparentWrapper(Wrapper):
    """A wrapper that learns exactly what the wrapped trainable learns, under the same names.

    Parameters, state, mode and losses are the other one's too, unless the wrapper defines them.
    """


def _forwarding(name: str, member: object) -> Any:
    """Return a method, or a property if ``member`` is one, that asks the wrapped trainable."""
    if not inspect.isfunction(member):
        return property(lambda wrapper: operator.attrgetter(name)(wrapper.wrapped))

    @functools.wraps(member)
    def forward(wrapper: Wrapper, *arguments: Any, **options: Any) -> Any:
        return operator.methodcaller(name, *arguments, **options)(wrapper.wrapped)

    return forward


def forward_all(wrapper: type, base: type) -> None:
    """Let a class with a property ``wrapped`` ask the wrapped one for everything public that a base class defines."""
    for name, member in vars(base).items():
        if not name.startswith("_"):
            setattr(wrapper, name, _forwarding(name, member))


forward_all(Wrapper, Hooks)
forward_all(TransparentWrapper, Trainable)


def misfits(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """Return why a state can't replace other tensors: what is missing, unknown, misshapen or not finite.

    Args:
        expected: The tensors to be replaced, by name.
        state: What should replace them.
    """
    problems = [f"{name} is missing" for name in expected if name not in state]
    problems += [f"{name} is unknown" for name in state if name not in expected]

    for name, target in expected.items():
        tensor = state.get(name)
        if tensor is None:
            continue
        if tensor.shape != target.shape:
            problems.append(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(target.shape)}")
        elif tensor.is_floating_point() != target.is_floating_point():
            problems.append(f"{name} is {tensor.dtype}, expected {target.dtype}")
        elif not bool(tensor.isfinite().all()):
            problems.append(f"{name} is not finite")

    return problems
