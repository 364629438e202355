"""Listing images and class folders: sorted, without hidden files, never outside the folder."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path

from vlprompt.data.images import EXTENSIONS

__all__ = ["list_folders", "list_images"]


def list_folders(folder: Path, root: Path) -> list[Path]:
    """Return the visible subfolders in byte order of their names, without links that leave ``root``."""
    folders = [p for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "__MACOSX"))]
    return sorted((p for p in folders if _stays(p, root)), key=lambda p: os.fsencode(p.name))


def list_images(folder: Path, root: Path, extensions: Sequence[str] = EXTENSIONS) -> list[str]:
    """Return all images below a folder as sorted paths relative to ``root``, with ``/``.

    Args:
        folder: Where to look, at any depth; links to folders are not followed.
        root: What paths are relative to; a link that leaves it is left out with a warning.
        extensions: Endings that count as images, lower case with the dot.
    """
    images = []
    for parent, folders, files in os.walk(folder):
        # os.walk visits what is left in this list, in this order.
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in files:
            path = Path(parent, name)
            if not name.startswith(".") and path.suffix.lower() in extensions and _stays(path, root):
                images.append(path.relative_to(root).as_posix())

    # Bytes, not characters: the order does not depend on the locale.
    return sorted(images, key=os.fsencode)


def _stays(path: Path, root: Path) -> bool:
    if not path.is_symlink() or path.resolve().is_relative_to(root.resolve()):
        return True
    warnings.warn(f"{path} is a link that leaves {root}: ignored.", stacklevel=4)
    return False
