"""What a run depends on: a fingerprint of a data set's files, and a sentence where files are missing."""

from __future__ import annotations

import os
from pathlib import Path

from vlprompt.core.files import path_fingerprint
from vlprompt.data.catalog import default_root

__all__ = ["data_fingerprint", "missing_data"]


def data_fingerprint(name: str, root: str | os.PathLike[str] | None = None) -> str:
    """Return what changes when a file of a data set changes; empty for embedded data."""
    kind, colon, argument = name.partition(":")
    if not colon:
        return ""
    folder = default_root() if root is None else Path(root).expanduser()
    return path_fingerprint(folder / argument)


def missing_data(name: str, root: str | os.PathLike[str] | None = None) -> str | None:
    """Return what is missing of a data set and how to get it; None if it is there."""
    return f"{name} does not exist." if data_fingerprint(name, root) == "absent" else None
