"""Tar archives as webdataset writes them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

__all__ = ["write_shard"]


def write_shard(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """Write an archive of files, names and contents, in this order; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path
