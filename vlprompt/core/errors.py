"""Errors written for people: what was got, where it came from, what is allowed, the nearest valid name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from textwrap import shorten

__all__ = [
    "BackboneError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "NonFiniteError",
    "ProcessLostError",
    "UnknownNameError",
    "VLPromptError",
    "first_line",
    "nearest",
]


class VLPromptError(ValueError):
    """Base of every error a user can cause; command lines print its message and exit with status 2."""


class UnknownNameError(VLPromptError, KeyError):
    """A name that no registry, card or folder knows.

    Args:
        kind: What was looked up, for example ``"learner"``.
        name: The name that was asked for.
        known: The names that exist.
        hint: An extra sentence, for example how to install what is missing.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        self.kind = kind
        self.name = name
        self.known = sorted(known)
        super().__init__(_unknown_message(kind, name, self.known, hint))

    def __str__(self) -> str:  # KeyError would print the repr, with escaped newlines
        return str(self.args[0])


class ConfigError(VLPromptError):
    """One or more mistakes in a configuration, all reported at once.

    Args:
        problems: One sentence per mistake, each naming the key, the bad value and what is allowed.
        source: The file or call the configuration came from.
    """

    def __init__(self, problems: Sequence[str], source: str = "configuration") -> None:
        self.problems = list(problems)
        count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
        super().__init__("\n".join([f"{source}: {count}", *(f"  - {p}" for p in problems)]))


class DataError(VLPromptError):
    """A data set, image, split or label that can't be used as it is."""


class BackboneError(VLPromptError):
    """A backbone that can't be built, fetched, or can't do what a learner needs."""


class CheckpointError(VLPromptError):
    """A checkpoint or artefact that is damaged, foreign or could not be written."""


class NonFiniteError(VLPromptError):
    """A loss or gradient that is NaN or infinite; names the tensor and the step."""


class ProcessLostError(VLPromptError):
    """Another process of a run that several compute together is gone."""


def first_line(error: Exception) -> str:
    """Return the first line of what an error of another library says, shortened; its kind if it says nothing."""
    lines = str(error).strip().splitlines()
    return shorten(lines[0] if lines else type(error).__name__, 300, placeholder=" ...")


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Return up to ``count`` known names that look like ``name``, best first."""
    lowered = {k.lower(): k for k in known}
    matches = difflib.get_close_matches(name.lower(), list(lowered), n=count, cutoff=0.5)
    return [lowered[f] for f in matches]


def _unknown_message(kind: str, name: str, known: list[str], hint: str) -> str:
    lines = [f"unknown {kind} {name!r}."]
    if close := nearest(name, known):
        lines.append(f"Did you mean {' or '.join(repr(c) for c in close)}?")

    listing = ", ".join(known[:40]) + (f", ... ({len(known)} in all)" if len(known) > 40 else "")
    lines.append(f"Known: {listing or 'none'}.")

    if hint:
        lines.append(hint)
    return " ".join(lines)
