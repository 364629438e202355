"""What the sources of pairs share: phrases, classes of phrases, missing files, parts cut by hash."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from vlprompt.core.errors import DataError
from vlprompt.core.paths import user_path
from vlprompt.core.seeding import numpy_rng
from vlprompt.data.listing import list_images
from vlprompt.data.segmentation.base import MaskSample
from vlprompt.data.sources import AbsentError, Request
from vlprompt.data.splits import cut

__all__ = [
    "Missing",
    "choose",
    "class_phrase",
    "need_part",
    "one_of_each",
    "own_folder",
    "refuse_missing",
    "split_by_hash",
    "stems",
]

Missing = Literal["error", "skip"]


def choose(options: Sequence[str], record: str, what: str) -> str:
    """Return one of several texts, drawn by the record's name alone: the same in every epoch, run and process."""
    return options[int(numpy_rng(0, what, record).integers(len(options)))]


def class_phrase(templates: Sequence[str], classname: str, record: str) -> str:
    """Return the phrase that asks for a class, by one of several templates."""
    return choose([t.format(classname) for t in templates], record, "phrase of a class")


def own_folder(request: Request, expected: str) -> Path:
    """Return the folder of ``kind:PATH``. Raises DataError if it isn't there."""
    root = user_path(request.argument)
    if not request.argument or not root.is_dir():
        raise AbsentError(f"{request.name}: there is no folder {str(root)!r}. Expected in it: {expected}.")
    return root


def stems(folder: Path) -> dict[str, list[str]]:
    """Return the images of a folder by their path without the ending, relative to it."""
    images_of: dict[str, list[str]] = {}
    for path in list_images(folder, folder):
        images_of.setdefault(path.rpartition(".")[0], []).append(path)
    return images_of


def one_of_each(folder: Path, files: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return the one file of each name (see :func:`stems`). Raises DataError if a name means two: a.jpg and a.png."""
    for names in files.values():
        if len(names) > 1:
            raise DataError(
                f"{folder}: {' and '.join(names)} have one name but for their endings, so a mask could be of either. "
                "Rename one of them."
            )
    return {stem: names[0] for stem, names in files.items()}


def refuse_missing(name: str, problems: Sequence[str], policy: Missing) -> None:
    """Refuse pairs of which one half isn't there, or warn that they are left out."""
    if not problems:
        return

    examples = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
    if policy == "error":
        raise DataError(
            f"{name}: {len(problems)} incomplete pairs: {examples}. Add what is missing, or pass on_missing='skip'."
        )
    warnings.warn(f"{name}: {len(problems)} incomplete pairs are left out: {examples}.", stacklevel=4)


def split_by_hash(
    name: str, images: Sequence[str], shares: Mapping[str, float], seed: int = 0
) -> dict[str, tuple[str, ...]]:
    """Cut images into parts by a hash of their names (see :func:`vlprompt.data.splits.cut`)."""
    parts = cut({0: list(images)}, shares, name, [name], seed)
    return {part: tuple(str(s.source) for s in samples) for part, samples in parts.items()}


def need_part(request: Request, parts: Mapping[str, Sequence[MaskSample]]) -> tuple[MaskSample, ...]:
    """Return the samples of the split that is asked for. Raises DataError if it doesn't exist or is empty."""
    if request.split not in parts:
        raise DataError(f"{request.name} has no split {request.split!r}, only {', '.join(parts) or 'none'}.")
    if not parts[request.split]:
        raise DataError(f"{request.name}: the split {request.split!r} is empty.")
    return tuple(parts[request.split])
