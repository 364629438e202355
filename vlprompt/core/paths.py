"""Paths as people type them."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from vlprompt.core.errors import DataError

__all__ = ["local_or_name", "looks_like_path", "user_path"]


def user_path(text: str | PathLike[str]) -> Path:
    """Return the path that a person means: a leading ``~`` is the home folder, ``~name`` that of another user.

    Every option that takes a path goes through here. A home folder that is unknown leaves the path as it is written.
    """
    if not isinstance(text, str | PathLike):
        raise DataError(f"a path is a text or a Path; got {type(text).__name__}.")
    path = Path(text)
    try:
        return path.expanduser()
    except RuntimeError:  # no such user
        return path


def local_or_name(text: str) -> str:
    """Return the whole path where there is something, and a name on the Hub or a tag as it is."""
    path = user_path(text)
    return str(path) if path.exists() else text


def looks_like_path(text: str) -> bool:
    """Return whether a word can only be meant as a path, because it has a separator, a ``~`` or an ending.

    Names of weights, data sets and methods have none of them.
    """
    return any(sign in text for sign in "/\\.") or text.startswith("~")
