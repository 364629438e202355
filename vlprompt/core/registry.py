"""One registry for every kind of thing that is looked up by name.

Entries register themselves with a decorator when their module is imported. Modules inside the package are
found by walking it, third-party ones by the entry-point group ``vlprompt.<kind>s`` (a space in
the kind is ``_`` there: ``vlprompt.pair_sources``); nothing is listed by hand.
"""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from vlprompt.core.errors import DataError, UnknownNameError, VLPromptError

__all__ = ["Entry", "Registry"]

T = TypeVar("T")


@dataclass(frozen=True)
class Entry(Generic[T]):
    """What a registry knows of one name.

    Attributes:
        name: The name users type.
        target: The class or function it stands for.
        summary: One line for lists and documentation.
        paper: Where it was published (arXiv id or venue), empty if nowhere.
        needs: What it requires of others, for example ``("text_prompts",)``.
    """

    name: str
    target: T
    summary: str
    paper: str = ""
    needs: tuple[str, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        """The module the target was defined in."""
        return getattr(self.target, "__module__", "?")


class Registry(Generic[T]):
    """Names of one kind, discovered on first use.

    Args:
        kind: Singular noun for messages, for example ``"learner"``.
        package: Package whose modules register entries, imported on the first lookup.
    """

    def __init__(self, kind: str, package: str) -> None:
        self.kind = kind
        self.package = package
        self._entries: dict[str, Entry[T]] = {}
        self._discovered = False

    def register(
        self, name: str, *, summary: str, paper: str = "", needs: tuple[str, ...] = (), **extra: Any
    ) -> Callable[[T], T]:
        """Return a decorator that adds its target under ``name``.

        Raises:
            VLPromptError: If another target already owns the name; the message names both.
        """

        def add(target: T) -> T:
            entry = Entry(name, target, summary, paper, needs, extra)
            existing = self._entries.get(name, entry)
            same = (existing.owner, _qualname(existing.target)) == (entry.owner, _qualname(target))
            if not same:
                raise VLPromptError(
                    f"{self.kind} {name!r} is registered twice: by {existing.owner} and by {entry.owner}. Rename one."
                )

            self._entries[name] = entry
            return target

        return add

    def get(self, name: str) -> Entry[T]:
        """Return the entry of ``name``.

        Raises:
            UnknownNameError: With the nearest valid names.
        """
        if not isinstance(name, str):
            raise DataError(f"the name of a {self.kind} is a text; got {type(name).__name__}.")
        self._discover()
        if name not in self._entries:
            raise UnknownNameError(self.kind, name, self._entries)
        return self._entries[name]

    def names(self, pattern: str = "*") -> list[str]:
        """Return the sorted names that match a shell pattern."""
        self._discover()
        return sorted(n for n in self._entries if fnmatch(n, pattern))

    def __iter__(self) -> Iterator[Entry[T]]:
        return iter([self._entries[n] for n in self.names()])

    def __contains__(self, name: str) -> bool:
        self._discover()
        return name in self._entries

    def _discover(self) -> None:
        if self._discovered:
            return

        self._discovered = True
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            if not module.name.startswith("_"):
                importlib.import_module(f"{self.package}.{module.name}")

        for point in entry_points(group=f"vlprompt.{self.kind.replace(' ', '_')}s"):
            try:
                point.load()
            except Exception as error:  # a broken plug-in must not take the library down with it
                warnings.warn(f"plug-in {point.name!r} ({point.value}) failed to load: {error}", stacklevel=3)


def _qualname(target: object) -> str:
    return getattr(target, "__qualname__", repr(target))
