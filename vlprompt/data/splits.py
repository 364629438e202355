"""Splits: cutting a listing into train, val and test, and reading and writing split files.

A split file is the few-shot protocol's own format: ``{"train": [[path, label, class name], ...], "val": ...,
"test": ...}``, paths relative to the data set's image folder.

Reference: KaiyangZhou/CoOp datasets/oxford_pets.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
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
    "cut_validation",
    "cut_whole",
    "is_inside",
    "normal_split",
    "read_split",
    "write_split",
]

SPLITS = ("train", "val", "test")
_ALIASES = {
    "train": "train",
    "training": "train",
    "trn": "train",
    "val": "val",
    "valid": "val",
    "validate": "val",
    "validation": "val",
    "dev": "val",
    "development": "val",
    "test": "test",
    "testing": "test",
    "tst": "test",
    "eval": "test",
    "evaluation": "test",
}
# What people put around the word: train_set, images-train, testdata, val_split, test images.
_AROUND = re.compile(r"[-_. ]+|images|imgs|data|set|split")
_SHARES = {"train": 0.6, "val": 0.2, "test": 0.2}
_VAL_OF_TRAIN = {"val": 0.2, "train": 0.8}


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
    """Return ``train``, ``val`` or ``test`` for a common spelling of it, None for anything else.

    ``dev`` is val, and ``eval`` is test, as on the Hugging Face Hub.
    """
    lowered = name.strip().lower()
    return _ALIASES.get(lowered) or _ALIASES.get(_AROUND.sub("", lowered))


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
                f"to cut into {', '.join(shares)}. Add images, or provide the splits yourself; to score "
                "everything there is, load the split 'all' (vlprompt evaluate --all)."
            )
        sizes = _sizes(len(paths), list(shares.values()))
        start = 0
        for part, size in zip(shares, sizes, strict=True):
            parts[part].extend(Sample(p, label) for p in sorted(paths[start : start + size]))
            start += size

    return {part: tuple(samples) for part, samples in parts.items()}


def cut_whole(
    groups: Mapping[int, Sequence[str]],
    key: str,
    names: Sequence[str],
    seed: int = 0,
    validation: bool = True,
) -> dict[str, tuple[Sample, ...]]:
    """Cut images that have no splits 60/20/20 into train, val and test, per class (see :func:`cut`).

    Args:
        groups: See :func:`cut`.
        key: See :func:`cut`.
        names: See :func:`cut`.
        seed: See :func:`cut`.
        validation: False leaves what would be val in train; test has the same images.

    Raises:
        DataError: See :func:`cut`; without validation two images of a class are enough.
    """
    if validation:
        return cut(groups, _SHARES, key, names, seed)

    pairs = {label: paths for label, paths in groups.items() if len(paths) == 2}
    others = {label: paths for label, paths in groups.items() if len(paths) != 2}
    if any(len(paths) < 2 for paths in others.values()):
        cut(groups, {"train": 0.8, "test": 0.2}, key, names, seed)  # says what is too few

    parts = cut(others, _SHARES, key, names, seed)
    halves = cut(pairs, {"train": 0.5, "test": 0.5}, key, names, seed)
    train = [*parts["train"], *parts["val"], *halves["train"]]
    test = [*parts["test"], *halves["test"]]
    return {"train": _in_order(train), "val": (), "test": _in_order(test)}


def cut_validation(
    groups: Mapping[int, Sequence[str]],
    key: str,
    names: Sequence[str],
    seed: int = 0,
    validation: bool = True,
) -> dict[str, tuple[Sample, ...]]:
    """Cut val from the training images, a fifth of each class but never its last image.

    Args:
        groups: See :func:`cut`.
        key: See :func:`cut`.
        names: See :func:`cut`.
        seed: See :func:`cut`.
        validation: False cuts nothing.
    """
    enough = {label: paths for label, paths in groups.items() if validation and len(paths) > 1}
    parts = cut(enough, _VAL_OF_TRAIN, key, names, seed)
    rest = [Sample(p, label) for label, paths in groups.items() if label not in enough for p in paths]
    return {"train": _in_order([*parts["train"], *rest]), "val": parts["val"]}


def _in_order(samples: Sequence[Sample]) -> tuple[Sample, ...]:
    """Return samples by label, then path."""
    return tuple(sorted(samples, key=lambda sample: (sample.classes, sample.source)))


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
    except (ValueError, RecursionError) as error:
        raise DataError(f"the split file {path} is no valid JSON: {error}.") from None

    if not isinstance(content, dict) or not set(SPLITS) <= set(content):
        raise DataError(f"the split file {path} needs the keys {', '.join(SPLITS)}.")
    wrong = [split for split in SPLITS if not isinstance(content[split], list)]
    if wrong:
        raise DataError(f"the split file {path}: {wrong[0]!r} must be a list of [path, label, class name].")

    names: dict[int, str] = {}  # filled by _entry: every part must use the same names
    parts: dict[str, tuple[Sample, ...]] = {}
    for split in SPLITS:
        parts[split] = tuple(_entry(path, split, i, entry, names) for i, entry in enumerate(content[split]))

    if sorted(names) != list(range(len(names))):
        missing = next(label for label in range(len(names)) if label not in names)
        raise DataError(f"the split file {path}: labels must be 0..C-1 without gaps; {missing} is missing.")

    return SplitFile(parts, tuple(names[label] for label in sorted(names)), digest)


def write_split(path: Path, parts: Mapping[str, Sequence[Sample]], classnames: Sequence[str]) -> None:
    """Write a split file under a temporary name and rename it. Raises OSError if that can't be done."""
    content: dict[str, list[list[Any]]] = {split: [] for split in SPLITS}
    for split in SPLITS:
        for sample in parts[split]:
            label = sample.classes[0]
            content[split].append([str(sample.source), label, classnames[label]])

    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")  # short, whatever the length of the name
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
