"""Tar archives as webdataset writes them: members that share a key are one sample. Images stay where they are.

Captions and labels are read by this one reader (:mod:`vlprompt.data.captions.tar`, :mod:`vlprompt.data.sources.tar`).
"""

from __future__ import annotations

import tarfile
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from vlprompt.core.errors import DataError
from vlprompt.data.archives import Archive, WholeMember
from vlprompt.data.images import EXTENSIONS

__all__ = ["LeftOut", "PackedImage", "TarSample", "TextMember", "scan_tar"]


@dataclass(frozen=True)
class PackedImage:
    """Where an image lies; as text it is ``ARCHIVE@NAME``.

    Attributes:
        archive: The archive.
        name: The member's.
        offset: Of its bytes in the unpacked archive.
        length: Of them.
    """

    archive: Archive
    name: str
    offset: int
    length: int

    def read(self) -> bytes:
        """Return the image's bytes."""
        return self.archive.read(self.offset, self.length)

    def __str__(self) -> str:
        return f"{self.archive.path.name}@{self.name}"


@dataclass(frozen=True)
class TextMember:
    """A member that was read: its name, its size in bytes, and what was read of it."""

    name: str
    size: int
    data: bytes


@dataclass
class TarSample:
    """What one key of an archive holds.

    Attributes:
        archive: Where it lies.
        key: The path of its members without their last ending.
        first: Name of its first member, for messages.
        image: Its image.
        texts: Ending to the member that was read.
    """

    archive: Archive
    key: str
    first: str
    image: PackedImage | None = None
    texts: dict[str, TextMember] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """Its archive and its image, or what it has instead, for messages."""
        return f"{self.archive.path.name}: {self.image.name if self.image else self.first}"


@dataclass
class LeftOut:
    """Counts what is left out, by reason, and remembers the first of each."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, where: str) -> None:
        """Count one; ``reason`` stands behind the number in the warning."""
        self.counts[reason] += 1
        self.first.setdefault(reason, where)

    def merge(self, other: LeftOut) -> None:
        """Count what another has counted."""
        self.counts += other.counts
        for reason, where in other.first.items():
            self.first.setdefault(reason, where)

    def warn(self, title: str, stacklevel: int) -> None:
        """Say how many were left out and why, one warning for each reason."""
        for reason, count in self.counts.items():
            warnings.warn(
                f"{title}: {count} {reason}, first {self.first[reason]}.", stacklevel=stacklevel + 1
            )


def scan_tar(
    archive: Archive, is_text: Callable[[PurePosixPath], bool], longest: int, left_out: LeftOut, expected: str
) -> list[TarSample]:
    """Return the samples of an archive, in its order. Only headers and texts are read.

    A key is everything before the last point, so ``a.1.jpg`` belongs to ``a.1.txt``. Hidden members and folders do not
    count; what is no image and no text is counted.

    Args:
        archive: What to scan.
        is_text: Whether a member is to be read.
        longest: Bytes that are read of it, and one more.
        left_out: Takes the members that belong to no sample.
        expected: What members should be, for the count: ``"captions"``, ``"labels"``.

    Raises:
        DataError: If the archive is damaged, ends inside an image, or a key has two images or a text twice.
    """
    samples: dict[str, TarSample] = {}
    other = f"members are no images and no {expected} and are left out"
    try:
        with archive.open() as file, tarfile.open(fileobj=file, mode="r:", tarinfo=WholeMember) as tar:
            last = -1
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
                is_image = ending in EXTENSIONS
                if not member.isreg() or member.issparse() or not (is_image or is_text(path)):
                    left_out.add(other, f"{archive.path.name}: {member.name}")
                    continue

                key = str(path.with_suffix(""))
                sample = samples.setdefault(key, TarSample(archive, key, member.name))
                if is_image:
                    _add_image(sample, member)
                else:
                    _add_text(sample, tar, member, ending, longest)

            if (
                tar.offset >= archive.size
            ):  # where a block of zeros should be; tarfile takes the end of the file for one
                left_out.add("archives have no end mark and may be cut short", archive.path.name)
    except DataError:
        raise
    except Exception as error:  # damaged headers raise TarError, OSError, ValueError, struct.error and others
        raise DataError(f"{archive.path} is no readable tar file: {error}.") from None

    return list(samples.values())


def _add_image(sample: TarSample, member: tarfile.TarInfo) -> None:
    """Note where a sample's image lies."""
    archive = sample.archive
    if sample.image is not None:
        what = "twice" if sample.image.name == member.name else f"beside {sample.image.name}"
        raise DataError(
            f"{archive.path} holds {member.name} {what}: one key, two images. Remove one of them."
        )
    if member.size < 0 or member.offset_data + member.size > archive.size:
        raise DataError(f"{archive.path} is no readable tar file: it ends inside {member.name}.")

    sample.image = PackedImage(archive, member.name, member.offset_data, member.size)


def _add_text(
    sample: TarSample, tar: tarfile.TarFile, member: tarfile.TarInfo, ending: str, longest: int
) -> None:
    """Read a sample's text."""
    if ending in sample.texts:
        raise DataError(f"{sample.archive.path} holds {member.name} twice. Remove one of them.")

    file = tar.extractfile(member)
    data = b"" if file is None else file.read(longest + 1)
    sample.texts[ending] = TextMember(member.name, member.size, data)
