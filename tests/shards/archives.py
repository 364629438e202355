"""Small archives of images."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from tests.data.folders import image

__all__ = ["png", "write_tar"]


def png(seed: object) -> bytes:
    """Return the bytes of noise, 32 px."""
    out = io.BytesIO()
    image(seed, (32, 32)).save(out, "PNG")
    return out.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    """Write an archive of members, in their order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path
