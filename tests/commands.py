"""Running ``vlprompt`` in the test's own process: a new one would spend its time on imports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Answer", "Command"]


@dataclass(frozen=True)
class Answer:
    """What a command left: its exit status, and what it wrote on both streams."""

    status: int
    out: str
    err: str

    @property
    def last(self) -> str:
        """The last line on standard output."""
        return self.out.splitlines()[-1]


Command = Callable[..., Answer]
"""Takes the words behind ``vlprompt``."""
