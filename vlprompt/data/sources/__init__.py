"""Sources: one file per kind of storage, each turning a name or a card into an ``ImageDataset``.

A source is a function ``build(request, *, option=default, ...)``; its keyword-only parameters are the options
that ``load_dataset`` takes for it, so a new kind needs this one file and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlprompt.core.errors import DataError
from vlprompt.core.names import printable
from vlprompt.core.paths import user_path
from vlprompt.core.registry import Registry
from vlprompt.data.base import ImageDataset
from vlprompt.data.cards import Card, SourceSpec

__all__ = ["AbsentError", "Build", "Request", "local_path", "read_text", "sources"]

Build = Callable[..., ImageDataset]
sources: Registry[Build] = Registry("source", "vlprompt.data.sources")


class AbsentError(DataError):
    """The files of a data set are not where they are expected; the message says where that is."""


@dataclass(frozen=True)
class Request:
    """What is asked of a source.

    Attributes:
        name: The name as the user wrote it.
        argument: What follows the kind in the name: a task, a path; empty for a card.
        split: ``"train"``, ``"val"`` or ``"test"``; of the user's own files also ``"all"``.
        root: Where downloaded data sets lie.
        card: The card, for data sets that have one.
        source: The one of the card's sources that is asked; its first if None.
        validation: Whether val may be cut from images that would be train's; False where nothing validates.
    """

    name: str
    argument: str
    split: str
    root: Path
    card: Card | None = None
    source: SourceSpec | None = None
    validation: bool = True

    @property
    def options(self) -> dict[str, Any]:
        """The card's options for the source that is asked."""
        return (self.source or self.need_card.source).options

    @property
    def need_card(self) -> Card:
        """The card; DataError if the source was asked for without one."""
        if self.card is None:
            raise DataError(f"{self.name}: this kind of source is used through a card, see CONTRIBUTING.")
        return self.card


def local_path(request: Request) -> Path:
    """Return the path that a request's argument names, ``~`` replaced.

    Raises:
        DataError: If the system can't look there; a path where there is nothing is no error.
    """
    try:
        path = user_path(request.argument)
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise DataError(f"{printable(request.name)[:200]}: this path can't be used: {reason}.") from None
    return path


def read_text(path: Path) -> str:
    """Return the content of a list or index in UTF-8, with or without a byte order mark.

    Raises:
        DataError: If it can't be read, or is in another encoding; names the line.
    """
    try:
        data = path.read_bytes()
        return data.decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"can't read {printable(str(path))}: {error.strerror or error}.") from None
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            f"{printable(str(path))} is no text in UTF-8: line {line} holds the byte {data[error.start]:#04x}. Save it "
            "as UTF-8."
        ) from None
