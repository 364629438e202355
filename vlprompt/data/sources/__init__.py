"""Sources: one file per kind of storage, each turning a name or a card into an ``ImageDataset``.

A source is a function ``build(request, *, option=default, ...)``; its keyword-only parameters are the options
that ``load_dataset`` takes for it, so a new kind needs this one file and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vlprompt.data.base import ImageDataset
from vlprompt.data.cards import Card
from vlprompt.errors import DataError
from vlprompt.registry import Registry

__all__ = ["Build", "Request", "sources"]

Build = Callable[..., ImageDataset]
sources: Registry[Build] = Registry("source", "vlprompt.data.sources")


@dataclass(frozen=True)
class Request:
    """What is asked of a source.

    Attributes:
        name: The name as the user wrote it.
        argument: What follows the kind in the name: a task, a path; empty for a card.
        split: ``"train"``, ``"val"`` or ``"test"``.
        root: Where downloaded data sets lie.
        card: The card, for data sets that have one.
    """

    name: str
    argument: str
    split: str
    root: Path
    card: Card | None = None

    @property
    def need_card(self) -> Card:
        """The card; DataError if the source was asked for without one."""
        if self.card is None:
            raise DataError(f"{self.name}: this kind of source is used through a card, see CONTRIBUTING.")
        return self.card
