"""Searching concepts for a frozen model: what the trainer trains, and which of the model's parameters may join.

Paper: Yi et al., arXiv 2305.18993. Its second stage (tuning the model with the concepts as language input) is
known from the abstract alone; which parameters it tunes is for the user to say here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from vlprompt.concepts.embedding import Concepts
from vlprompt.core.errors import ConfigError, nearest
from vlprompt.core.trainable import Trainable

__all__ = ["ConceptSearch", "SearchResult", "Unfrozen"]

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class SearchResult(Generic[Module]):
    """What a search leaves behind.

    Attributes:
        module: The concepts, in their host.
        history: One record per epoch.
        seconds: Of the whole search, encoding of the images included.
    """

    module: Module
    history: list[dict[str, Any]] = field(repr=False)
    seconds: float


class Unfrozen(nn.Module):
    """Parameters of a frozen model that learn, chosen by name; the model is changed in place.

    Args:
        host: The model; all its parameters are frozen, then those that match are not.
        patterns: Shell patterns of parameter names (``"class_head.*"``).

    Raises:
        ConfigError: If a pattern matches no parameter, with the nearest names, or one in half precision.
    """

    def __init__(self, host: nn.Module, patterns: Sequence[str] = ()) -> None:
        super().__init__()
        host.requires_grad_(False)
        parameters = dict(host.named_parameters())

        problems = []
        for pattern in patterns:
            names = [name for name in parameters if fnmatch(name, pattern)]
            if not names:
                close = ", ".join(nearest(pattern, parameters)) or "none alike"
                problems.append(f"unfreeze: {pattern!r} matches no parameter; near it: {close}.")
            if half := [name for name in names if parameters[name].dtype != torch.float32]:
                problems.append(f"unfreeze: {half[0]!r} is stored in half precision; what learns needs fp32.")
            for name in names:
                parameters[name].requires_grad_(True)
                # torch allows no dot in the name of a parameter.
                self.register_parameter(name.replace(".", "/"), parameters[name])
        if problems:
            raise ConfigError(problems, "concept search")

        self._before = {name: p.detach().clone() for name, p in self.named_parameters()}

    def restore(self) -> None:
        """Put back the values that the model came with, and freeze it."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(self._before[name])
                parameter.requires_grad_(False)

    @contextmanager
    def restored_on_error(self) -> Iterator[None]:
        """Restore the model if the block fails: others may share it, and must not go on with half-trained values."""
        try:
            yield
        except BaseException:
            self.restore()
            raise


class ConceptSearch(nn.Module, Trainable):
    """Base of all searches: concepts as the language input of a host, trained by the host's own loss.

    The host is no part of the module's parameters, except for what ``unfreeze`` names.

    Args:
        concepts: What is learned in the place of language.
        host: The frozen model.
        unfreeze: See :class:`Unfrozen`.
    """

    def __init__(self, concepts: nn.Module, host: nn.Module, unfreeze: Sequence[str] = ()) -> None:
        super().__init__()
        self.concepts = concepts
        self.unfrozen = Unfrozen(host, unfreeze)
        self._host = [host]  # in a list: its parameters and its training mode are its own

    def loss(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the host's losses of a batch."""
        raise NotImplementedError

    def to_concepts(self, names: Sequence[str]) -> Concepts:
        """Return what was learned as a file's content.

        Args:
            names: C names of the concepts.
        """
        raise NotImplementedError

    def title(self) -> str:
        """See :meth:`Trainable.title`."""
        return "the search of concepts"
