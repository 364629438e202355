"""Checksums of downloaded files, written ``sha256:...``, ``md5:...`` or ``git:...``.

``git:`` is the id that git gives a file (SHA-1 over a header and the bytes); it is what is known of files that a public
repository holds at a fixed commit.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

__all__ = ["checksum", "matches"]

_CHUNK = 1 << 20


def checksum(path: Path, kind: str) -> str:
    """Return a file's checksum with its kind in front.

    Args:
        path: The file.
        kind: ``"sha256"``, ``"md5"`` or ``"git"``.
    """
    algorithm = "sha1" if kind == "git" else kind
    digest = hashlib.new(algorithm, usedforsecurity=False)
    if kind == "git":
        digest.update(f"blob {path.stat().st_size}\0".encode())

    with path.open("rb") as file:
        while block := file.read(_CHUNK):
            digest.update(block)

    return f"{kind}:{digest.hexdigest()}"


def matches(path: Path, expected: str | None) -> bool:
    """Return whether a file has the expected checksum; True if none is known."""
    return expected is None or checksum(path, expected.partition(":")[0]) == expected
