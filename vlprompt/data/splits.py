"""Splits: cutting a listing into train, val and test, and reading and writing split files.

A split file is the few-shot protocol's own format: ``{"train": [[path, label, class name], ...], "val": ...,
"test": ...}``, paths relative to the data set's image folder.

Reference: KaiyangZhou/CoOp datasets/oxford_pets.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from vlprompt.core.errors import DataError, UnknownNameError
from vlprompt.core.names import clean_classname
from vlprompt.core.seeding import derive_seed
from vlprompt.data.base import Sample
from vlprompt.data.checksums import matches

__all__ = [
    "SPLITS",
    "SplitFile",
    "check_split",
    "cut",
    "is_inside",
    "normal_split",
    "read_split",
    "write_split",
]

SPLITS = ("train", "val", "test")
_ALIASES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
}


@dataclass(frozen=True)
class SplitFile:
    """A split file's content.

    Attributes:
        parts: Samples of each split, in the file's order; sources are paths as written.
        classnames: By label, as a text tower should read them.
        sha256: Of the file's bytes.
    """

    parts: dict[str, tuple[Sample, ...]]
    classnames: tuple[str, ...]
    sha256: str


def normal_split(name: str) -> str | None:
    """Return ``train``, ``val`` or ``test`` for a common spelling of it, None for anything else."""
    return _ALIASES.get(name.strip().lower())


def check_split(name: str, split: str) -> str:
    """Return the split's normal name. Raises UnknownNameError for an unknown one."""
    normal = normal_split(split) if isinstance(split, str) else None
    if normal is None:
        raise UnknownNameError(f"split of {name}", str(split), SPLITS)
    return normal


def cut(
    groups: Mapping[int, Sequence[str]],
    shares: Mapping[str, float],
    key: str,
    names: Sequence[str],
    seed: int = 0,
) -> dict[str, tuple[Sample, ...]]:
    """Cut each class's images into parts, at least one image per part.

    Images are ranked by a hash of (seed, key, path), so the cut depends neither on the order of the listing
    nor on the machine, and an image that is added later moves at most a few others to another part.

    Args:
        groups: Paths by label.
        shares: Part name to its share in (0, 1]; the last part takes what rounding leaves.
        key: What is cut, part of the hash.
        names: Class names by label, for messages.
        seed: Another seed gives another cut.

    Returns:
        Samples by part, ordered by label, then path.

    Raises:
        DataError: If a class has fewer images than there are parts; names it.
    """
    parts: dict[str, list[Sample]] = {part: [] for part in shares}
    for label in sorted(groups):
        # The rank of an image is a hash of its own path, so other images hardly change it.
        paths = sorted(groups[label], key=lambda p: derive_seed(seed, "split", key, p))
        if len(paths) < len(shares):
            raise DataError(
                f"{key}: class {names[label]!r} has {len(paths)} image{'s' * (len(paths) != 1)}, too few "
                f"to cut into {', '.join(shares)}. Add images, or provide the splits yourself."
            )
        sizes = _sizes(len(paths), list(shares.values()))
        start = 0
        for part, size in zip(shares, sizes, strict=True):
            parts[part].extend(Sample(p, label) for p in sorted(paths[start : start + size]))
            start += size

    return {part: tuple(samples) for part, samples in parts.items()}


def read_split(path: Path, expected: str | None = None) -> SplitFile:
    """Read and check a split file.

    Args:
        path: The JSON file.
        expected: Checksum of the published file, if it is known. Another checksum causes a warning only, since
            copies differ in white space; results record what was read.

    Raises:
        DataError: If it is damaged, not of this format, its labels have gaps, a label has two names, or a
            path leaves the image folder; says where.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"can't read the split file {path}: {error.strerror or error}.") from None

    # Copies differ by a newline at the end, so the checksum without it counts too.
    digest = hashlib.sha256(raw).hexdigest()
    trimmed = f"sha256:{hashlib.sha256(raw.rstrip()).hexdigest()}"
    if not matches(path, expected) and trimmed != expected:
        warnings.warn(
            f"the split file {path} is not the published one ({expected}); results made with it say sha256 {digest}.",
            stacklevel=4,
        )

    try:
        content = json.loads(raw)
    except ValueError as error:
        raise DataError(f"the split file {path} is no valid JSON: {error}.") from None

    if not isinstance(content, dict) or not set(SPLITS) <= set(content):
        raise DataError(f"the split file {path} needs the keys {', '.join(SPLITS)}.")

    names: dict[int, str] = {}  # filled by _entry: every part must use the same names
    parts: dict[str, tuple[Sample, ...]] = {}
    for split in SPLITS:
        parts[split] = tuple(_entry(path, split, i, entry, names) for i, entry in enumerate(content[split]))

    if sorted(names) != list(range(len(names))):
        missing = min(set(range(max(names, default=0) + 1)) - set(names), default=0)
        raise DataError(f"the split file {path}: labels must be 0..C-1 without gaps; {missing} is missing.")

    return SplitFile(parts, tuple(names[label] for label in sorted(names)), digest)


def write_split(path: Path, parts: Mapping[str, Sequence[Sample]], classnames: Sequence[str]) -> None:
    """Write a split file under a temporary name and rename it. Raises OSError if that can't be done."""
    content: dict[str, list[list[Any]]] = {split: [] for split in SPLITS}
    for split in SPLITS:
        for sample in parts[split]:
            label = sample.classes[0]
            content[split].append([str(sample.source), label, classnames[label]])

    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_text(json.dumps(content), encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def is_inside(path: str) -> bool:
    """Return whether a relative path, as written, stays inside the folder it is relative to."""
    posix = PurePosixPath(path.replace("\\", "/"))
    return not posix.is_absolute() and ".." not in posix.parts and ":" not in (posix.parts or ("",))[0]


def _sizes(count: int, shares: list[float]) -> list[int]:
    """Return the number of images of each part: at least one, and the last part takes the rest."""
    sizes = []
    left = count
    for index, share in enumerate(shares[:-1]):
        later = len(shares) - 1 - index
        size = max(1, min(round(count * share), left - later))
        sizes.append(size)
        left -= size

    return [*sizes, left]


def _entry(path: Path, split: str, index: int, entry: Any, names: dict[int, str]) -> Sample:
    where = f"the split file {path}, {split} entry {index}"
    if not (
        isinstance(entry, list)
        and len(entry) == 3
        and isinstance(entry[0], str)
        and isinstance(entry[2], str)
    ):
        raise DataError(f"{where}: expected [path, label, class name], got {str(entry)[:80]}.")

    source, label, name = entry
    if isinstance(label, bool) or not isinstance(label, int) or label < 0:
        raise DataError(f"{where}: the label must be a whole number from 0, got {label!r}.")
    if not is_inside(source):
        raise DataError(f"{where}: the path {source!r} leaves the image folder.")

    name = clean_classname(name)
    if names.setdefault(label, name) != name:
        raise DataError(f"{where}: label {label} is {name!r} here and {names[label]!r} before.")
    return Sample(source, label)
