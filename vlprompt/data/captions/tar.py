"""tar:PATTERN: tar files as webdataset writes them, images and captions side by side under one key."""

from __future__ import annotations

import json
import tarfile
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from PIL import Image

from vlprompt.core.errors import DataError
from vlprompt.data.base import hash_strings
from vlprompt.data.captions import CAPTION_SOURCES
from vlprompt.data.captions.archives import Archive, find_archives
from vlprompt.data.images import EXTENSIONS, decode, file_stamp

__all__ = ["TarCaptions"]

_CAPTIONS = (".txt", ".caption", ".json")
_LONGEST_CAPTION = 1 << 20  # bytes; a longer file is no caption


class _BadCaptionError(ValueError):
    """Why a caption can't be used."""


@dataclass
class _Sample:
    """What one key of an archive holds.

    Attributes:
        archive: Where it lies.
        name: Of the image inside it.
        place: Offset and length of the image's bytes.
        captions: Ending to the caption of that file; empty where it has none.
        bad: Why a caption can't be used.
    """

    archive: Archive
    name: str
    place: tuple[int, int] | None = None
    captions: dict[str, str] = field(default_factory=dict)
    bad: str = ""

    @property
    def caption(self) -> str:
        """A text file's words; without one, the field ``caption`` of the JSON file."""
        return next((self.captions[ending] for ending in _CAPTIONS if self.captions.get(ending)), "")


@CAPTION_SOURCES.register(
    "tar", summary="webdataset archives: KEY.jpg beside KEY.txt or KEY.json", grammar="tar:PATTERN"
)
class TarCaptions:
    """Archives with ``KEY.jpg`` (or another image) and ``KEY.txt``, ``KEY.caption`` or ``KEY.json`` per pair.

    A key is everything before the last point, so ``a.1.jpg`` belongs to ``a.1.txt``. Headers are read once; images are
    read where they are. Of a list of captions the first is taken. What has no image, no caption or one that can't be
    read is left out; a warning counts it and names the first.

    Args:
        argument: A path, a pattern such as ``shards/*.tar`` or ``shards/{00..12}.tar``, or ``file:`` and a path.
            Archives may be compressed by gzip, bzip2 or xz; such a one is unpacked into a temporary file.

    Raises:
        DataError: If nothing matches, an archive is damaged, or a key has two images or two captions; names them.
    """

    def __init__(self, argument: str) -> None:
        left_out: Counter[str] = Counter()
        first: dict[str, str] = {}
        self.samples: list[_Sample] = []

        for archive in find_archives(argument):
            for sample in _scan(archive, left_out, first):
                reason = _lacks(sample)
                if not reason:
                    self.samples.append(sample)
                    continue
                left_out[reason] += 1
                first.setdefault(reason, f"{sample.archive.path.name}: {sample.bad or sample.name}")

        for reason, count in left_out.items():
            warnings.warn(f"tar:{argument}: {count} {reason}, first {first[reason]}.", stacklevel=3)

    def __len__(self) -> int:
        return len(self.samples)

    def caption(self, index: int) -> str:
        """See :meth:`CaptionSource.caption`."""
        return self.samples[index].caption

    def image(self, index: int) -> Image.Image:
        """See :meth:`CaptionSource.image`."""
        sample = self.samples[index]
        assert sample.place is not None  # the constructor kept no other
        return decode(sample.archive.read(*sample.place), f"{sample.archive.path.name}@{sample.name}")

    def identity(self) -> str:
        """See :meth:`CaptionSource.identity`."""
        return hash_strings(f"{s.archive.path.name}\t{s.name}\t{s.place}\t{s.caption}" for s in self.samples)

    def stamp(self, index: int) -> str:
        """See :meth:`CaptionSource.stamp`: the archive's, and the name inside it."""
        sample = self.samples[index]
        return f"{file_stamp(sample.archive.path)}@{sample.name}"


def _lacks(sample: _Sample) -> str:
    """Return why a sample is left out, as the words behind a count; empty if it is whole."""
    if sample.bad and not sample.caption:
        return "captions can't be read and are left out"
    if sample.place is None:
        return "captions have no image and are left out"
    return "" if sample.caption else "images have no caption and are left out"


def _scan(archive: Archive, left_out: Counter[str], first: dict[str, str]) -> list[_Sample]:
    """Return the samples of an archive, in its order; members that belong to none are counted."""
    samples: dict[str, _Sample] = {}
    several = "samples have several captions, of which the first is taken"
    other = "members are no images and no captions and are left out"
    try:
        with archive.open() as file, tarfile.open(fileobj=file, mode="r:") as tar:
            last = -1
            # Only headers and captions are read; the bytes of an image stay where they are.
            for member in tar:
                if member.offset <= last:  # a size that leads back would be read for ever
                    raise DataError(
                        f"{archive.path} is no readable tar file: {member.name!r} leads backwards."
                    )
                last = member.offset

                path = PurePosixPath(member.name)
                if path.name.startswith(".") or "__MACOSX" in path.parts or member.isdir():
                    continue
                ending = path.suffix.lower()
                if not member.isreg() or member.issparse() or ending not in (*EXTENSIONS, *_CAPTIONS):
                    left_out[other] += 1
                    first.setdefault(other, f"{archive.path.name}: {member.name}")
                    continue

                sample = samples.setdefault(str(path.with_suffix("")), _Sample(archive, member.name))
                if ending in EXTENSIONS:
                    _place(sample, member, archive)
                elif _add_caption(sample, tar, member, ending):
                    left_out[several] += 1
                    first.setdefault(several, f"{archive.path.name}: {member.name}")
    except DataError:
        raise
    except Exception as error:  # damaged headers raise TarError, OSError, ValueError, struct.error and others
        raise DataError(f"{archive.path} is no readable tar file: {error}.") from None

    return list(samples.values())


def _place(sample: _Sample, member: tarfile.TarInfo, archive: Archive) -> None:
    """Note where a sample's image lies."""
    if sample.place is not None:
        what = "twice" if sample.name == member.name else f"beside {sample.name}"
        raise DataError(
            f"{archive.path} holds {member.name} {what}: one key, two images. Remove one of them."
        )
    if member.size < 0 or member.offset_data + member.size > archive.size:
        raise DataError(f"{archive.path} is no readable tar file: it ends inside {member.name}.")

    sample.name = member.name
    sample.place = (member.offset_data, member.size)


def _add_caption(sample: _Sample, tar: tarfile.TarFile, member: tarfile.TarInfo, ending: str) -> bool:
    """Note a sample's caption, or why it is none; return whether there were several in one file."""
    if ending in sample.captions:
        raise DataError(f"{sample.archive.path} holds {member.name} twice. Remove one of them.")

    sample.captions[ending] = ""
    try:
        if member.size > _LONGEST_CAPTION:
            raise _BadCaptionError(f"{member.size} bytes are no caption")
        data = tar.extractfile(member)
        text, several = _caption(b"" if data is None else data.read(), ending)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        sample.bad = f"{member.name} ({error or type(error).__name__})"
        return False

    others = [value for value in sample.captions.values() if value]
    if ending != ".json" and text and any(value != text for value in others):
        kinds = [kind for kind in (".txt", ".caption") if sample.captions.get(kind) or kind == ending]
        if len(kinds) > 1:
            raise DataError(
                f"{sample.archive.path} holds two different captions of {member.name}: {' and '.join(kinds)} files."
            )
    sample.captions[ending] = text
    return several


def _caption(data: bytes, ending: str) -> tuple[str, bool]:
    """Return the words of a caption's file, and whether it holds several captions.

    Raises:
        ValueError: If it is no UTF-8, no JSON, or its caption is no text.
    """
    text: Any = data.decode("utf-8-sig")
    if ending != ".json":
        return " ".join(text.split()), False

    content = json.loads(text)
    value = content.get("caption") if isinstance(content, dict) else None
    several = isinstance(value, list) and len(value) > 1
    if isinstance(value, list):
        value = next(iter(value), None)
    if value is None:
        return "", False
    if not isinstance(value, str):
        raise _BadCaptionError(f"its caption is a {type(value).__name__}, no text")
    return " ".join(value.split()), several
