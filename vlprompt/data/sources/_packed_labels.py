"""What an archive says of its images: labels beside them, and a list of class names."""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from vlprompt.core.errors import DataError
from vlprompt.data.archives import Archive
from vlprompt.data.webdataset import LeftOut, PackedImage, TarSample, TextMember, scan_tar

__all__ = ["LISTS", "LabelledImage", "Shard", "listed_names_of", "read_shard"]

LISTS = ("classnames.txt", "classes.txt")
"""Files of all class names, one a line, in the order of their numbers."""

_LABELS = (".cls", ".json")
_LABEL_KEYS = ("label", "cls", "class", "target")  # of a JSON file
_NAME_KEYS = ("classname", "class_name", "label_name")
_LONGEST = 1 << 20  # bytes; a longer file is no label
_MOST_CLASSES = 100_000


class _BadLabelError(ValueError):
    """Why a label can't be used."""


@dataclass(frozen=True)
class LabelledImage:
    """An image with its class's number, its name, or both."""

    image: PackedImage
    number: int | None
    name: str | None


@dataclass(frozen=True)
class Shard:
    """What one archive holds.

    Attributes:
        path: Its file.
        images: Those with a label, in the archive's order.
        classnames: Its list of class names, if it has one.
        left_out: Everything else.
    """

    path: Path
    images: tuple[LabelledImage, ...]
    classnames: tuple[str, ...] | None
    left_out: LeftOut


@lru_cache(maxsize=65_536)
def read_shard(path: str, stamp: str, label_key: str | None) -> Shard:
    """Return what an archive holds; it is read once, until its size or time of change differ.

    Args:
        path: Its file.
        stamp: Of the file (see :func:`vlprompt.data.images.file_stamp`).
        label_key: The key of the label in JSON files; None finds it.

    Raises:
        DataError: If it is damaged, or labels contradict each other; says where.
    """
    left_out = LeftOut()
    archive = Archive.of(Path(path))
    samples = scan_tar(archive, _is_text, _LONGEST, left_out, "labels")

    images = []
    classnames: tuple[str, ...] | None = None
    for sample in samples:
        if sample.image is None and PurePosixPath(sample.first).name in LISTS:
            (member,) = sample.texts.values()
            names = listed_names_of(_checked_text(member), f"{path}: {member.name}")
            if classnames is not None and names != classnames:
                raise DataError(f"{path} has two different lists of class names; {sample.first} is one.")
            classnames = names
            continue

        number, name, bad = _label_of(sample, label_key)
        if bad:
            left_out.add("labels can't be read and are left out", f"{archive.path.name}: {bad}")
        elif sample.image is None:
            left_out.add("labels have no image and are left out", sample.where)
        elif number is None and name is None:
            left_out.add("images have no label and are left out", sample.where)
        else:
            images.append(LabelledImage(sample.image, number, name))
    return Shard(Path(path), tuple(images), classnames, left_out)


def listed_names_of(text: str, where: str) -> tuple[str, ...]:
    """Return the class names of a list. Raises DataError if there is none."""
    names = tuple(unicodedata.normalize("NFC", line.strip()) for line in text.splitlines() if line.strip())
    if not names:
        raise DataError(f"{where} names no class.")
    return names


def _is_text(member: PurePosixPath) -> bool:
    return member.suffix.lower() in _LABELS or member.name in LISTS


def _label_of(sample: TarSample, label_key: str | None) -> tuple[int | None, str | None, str]:
    """Return the number and the name of a sample's class, and what can't be read.

    Raises:
        DataError: If two of its files contradict each other.
    """
    number: int | None = None
    name: str | None = None
    for ending, member in sample.texts.items():
        try:
            values = _cls_values(member) if ending == ".cls" else _json_values(member, label_key)
        except (_BadLabelError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            return None, None, f"{member.name} ({error or type(error).__name__})"

        for value in values:
            before = number if isinstance(value, int) else name
            if before is not None and before != value:
                raise DataError(
                    f"{sample.archive.path}: the label of {sample.key} is {before!r}, and {value!r} in {member.name}."
                )
            if isinstance(value, int):
                number = value
            else:
                name = value
    return number, name, ""


def _checked_text(member: TextMember) -> str:
    try:
        return _text(member)
    except ValueError as error:
        raise DataError(f"{member.name} is no list of class names: {error}.") from None


def _text(member: TextMember) -> str:
    if member.size > _LONGEST:
        raise _BadLabelError(f"{member.size} bytes are no label")
    return member.data.decode("utf-8-sig")


def _cls_values(member: TextMember) -> list[int | str]:
    """Return what a ``.cls`` file says: a number or a name; nothing if it is empty."""
    text = " ".join(_text(member).split())
    return [_value(text)] if text else []


def _json_values(member: TextMember, label_key: str | None) -> list[int | str]:
    """Return what a JSON file says: a number, a name, or both."""
    content = json.loads(_text(member))
    if isinstance(content, (int, str)) and not isinstance(content, bool):
        return [_value(content)]
    if not isinstance(content, dict):
        raise _BadLabelError(f"it holds a {type(content).__name__}, not keys and values")

    keys = [label_key] if label_key is not None else [key for key in _LABEL_KEYS if key in content]
    if len(keys) > 1:
        raise DataError(
            f"{member.name}: the label may be {' or '.join(map(repr, keys))}; say which: label_key={keys[0]!r}."
        )
    found = [content[key] for key in (*keys, *_NAME_KEYS) if content.get(key) is not None]
    return [_value(value) for value in found]


def _value(value: Any) -> int | str:
    """Return a label as a number or as a name."""
    if isinstance(value, str) and value.strip():
        text = unicodedata.normalize("NFC", value.strip())
        return _value(int(text)) if re.fullmatch(r"-?\d{1,18}", text, re.ASCII) else text
    if isinstance(value, bool) or not isinstance(value, int):
        raise _BadLabelError(f"its label is {str(value)[:60]!r}, neither a whole number nor a name")
    if not 0 <= value < _MOST_CLASSES:
        raise _BadLabelError(f"its label is {value}; numbers go from 0 to {_MOST_CLASSES - 1}")
    return value
