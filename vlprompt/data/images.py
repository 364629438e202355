"""Images from files: robust decoding, content keys, and a check that finds unreadable images early.

Images are decoded in threads and processes, where the user sees no traceback, so a damaged file becomes one sentence
with its name. :func:`verify` decodes every image of a split once, before any worker starts: which images are used is
then the same in every process.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from PIL import Image

from vlprompt.core.errors import DataError
from vlprompt.core.names import printable
from vlprompt.data.base import ImageDataset, Reader
from vlprompt.data.decoding import (
    DEFAULT_DECODING,
    Decoding,
    FileStatus,
    UndecodableError,
    file_status,
    os_reason,
    read_image,
    walk_file,
)

__all__ = [
    "EXTENSIONS",
    "BadImage",
    "FileReader",
    "SkipLimits",
    "VerificationReport",
    "drop_bad",
    "file_key",
    "file_stamp",
    "pixel_key",
    "refuse_if_fatal",
    "verify",
]

EXTENSIONS = (
    ".bmp", ".apng", ".avif", ".dib", ".gif", ".heic", ".heif", ".hif", ".j2k", ".jfif", ".jp2", ".jpe", ".jpeg",
    ".jpf", ".jpg", ".jpx", ".pbm", ".pfm", ".pgm", ".png", ".pnm", ".ppm", ".qoi", ".tga", ".tif", ".tiff", ".webp",
)  # fmt: skip
BadImagePolicy = Literal["skip", "error"]

_digests: dict[FileStatus, str] = {}
_verdicts: dict[tuple[FileStatus, Decoding], tuple[str, str]] = {}


@dataclass(frozen=True)
class FileReader(Reader):
    """Reads images below one folder; a source is a path relative to it, with ``/``.

    Attributes:
        root: The folder.
        decoding: See :func:`vlprompt.data.decoding.read_image`.
    """

    root: Path
    decoding: Decoding = DEFAULT_DECODING

    def with_jpeg_side(self, side: int) -> FileReader:
        """See :meth:`Reader.with_jpeg_side`."""
        return replace(self, decoding=replace(self.decoding, jpeg_side=side))

    def path(self, source: str) -> Path:
        """Return where a source lies."""
        return self.root / source

    def read(self, source: str) -> Image.Image:
        """Return the image as RGB (see :func:`read_image`)."""
        return read_image(self.path(source), self.decoding)

    def check(self, source: str) -> str:
        """Return why an image can't be decoded, empty if it can; remembered like :meth:`key`."""
        return _verdict(self.path(source), self.decoding)[0]

    def note(self, source: str) -> str:
        """See :meth:`Reader.note`."""
        return _verdict(self.path(source), self.decoding)[1]

    def key(self, source: str) -> str:
        """Return ``file:`` and the sha256 of the bytes; remembered until size or time of change differ."""
        path = self.path(source)
        try:
            status = file_status(path)
            if status not in _digests:
                _digests[status] = file_key(path.read_bytes())
        except OSError as error:
            raise DataError(f"can't read the image {printable(str(path))}: {os_reason(error)}.") from None

        return _digests[status] + self.decoding.key

    def stamp(self, source: str) -> str:
        """See :meth:`Reader.stamp`; ``"absent"`` if there is no such file."""
        return file_stamp(self.path(source))


@dataclass(frozen=True)
class BadImage:
    """One unreadable image: its index in the split, its name and why it can't be used."""

    index: int
    name: str
    reason: str


@dataclass(frozen=True)
class VerificationReport:
    """What :func:`verify` found.

    Attributes:
        checked: How many images were decoded.
        bad: The unreadable ones, by index.
        notes: What decoding changes of readable ones (see :meth:`Reader.note`), and of how many.
    """

    checked: int
    bad: tuple[BadImage, ...] = ()
    notes: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        if not self.bad:
            return f"{self.checked} images checked, all readable"
        examples = "; ".join(f"{b.name} ({b.reason})" for b in self.bad[:10])
        more = f"; and {len(self.bad) - 10} more" if len(self.bad) > 10 else ""
        return f"{len(self.bad)} of {self.checked} images can't be read: {examples}{more}"


def verify(
    dataset: ImageDataset, indices: Iterable[int] | None = None, workers: int | None = None
) -> VerificationReport:
    """Decode images once and report the unreadable ones, without keeping any.

    Results are remembered in memory by path, size and time of change. JPEG files are decoded at an eighth of
    their size, which still reads every byte of them.

    Args:
        dataset: What to check.
        indices: Which samples; all of them if None.
        workers: Threads; the machine's cores (at most 8) if None. They are no loading workers: a look at a file is
            cheap, the decoder leaves the interpreter to others, and what it finds is remembered in this process.
    """
    chosen = list(range(len(dataset)) if indices is None else indices)
    threads = workers or min(8, os.cpu_count() or 1)

    def check(part: list[int]) -> tuple[list[BadImage], Counter[str]]:
        bad = []
        notes: Counter[str] = Counter()
        for index in part:
            source = dataset.samples[index].source
            reason = dataset.reader.check(source)
            if reason:
                bad.append(BadImage(index, printable(str(source)), reason))
            elif note := dataset.reader.note(source):
                notes[note] += 1
        return bad, notes

    # One task for each thread: a task for each image would cost more than looking at a drawn one.
    parts = [chosen[start::threads] for start in range(threads)]
    bad_images: list[BadImage] = []
    counts: Counter[str] = Counter()
    with ThreadPoolExecutor(threads) as pool:
        for bad, notes in pool.map(check, parts):
            bad_images += bad
            counts += notes

    in_order = sorted(bad_images, key=lambda bad: bad.index)
    return VerificationReport(len(chosen), tuple(in_order), tuple(sorted(counts.items())))


def drop_bad(
    dataset: ImageDataset,
    policy: BadImagePolicy,
    max_share: float,
    report: VerificationReport | None = None,
    max_images: int = 0,
) -> ImageDataset:
    """Return the data set without its unreadable images, named in a warning and ``info["skipped"]``.

    Args:
        dataset: What to clean.
        policy: ``"skip"`` leaves bad images out; ``"error"`` refuses the data set.
        max_share: Largest share of bad images, in [0, 1], that may be skipped.
        report: What :func:`verify` said, if it was called already.
        max_images: See :class:`SkipLimits`.

    Raises:
        DataError: Under ``"error"``, or if more can't be read than may be skipped; names the files.
    """
    report = verify(dataset) if report is None else report
    if report.notes:
        listing = "; ".join(f"{note} ({count} images)" for note, count in report.notes[:3])
        more = f"; and {len(report.notes) - 3} other ranges" if len(report.notes) > 3 else ""
        warnings.warn(
            f"{dataset.name} ({dataset.split}): {listing}{more}. To set the range: value_range=[LOW, HIGH].",
            stacklevel=3,
        )
    if not report.bad:
        return dataset

    limits = SkipLimits(max_share, max_images)
    refuse_if_fatal(dataset.name, dataset.split, report, policy, limits, len(dataset))
    bad = {b.index for b in report.bad}
    names = [*dataset.info.get("skipped", []), *(b.name for b in report.bad)]
    readable = [i for i in range(len(dataset)) if i not in bad]

    return dataset.subset(readable, skipped=names)


@dataclass(frozen=True)
class SkipLimits:
    """How many unreadable images of a split may be skipped.

    Attributes:
        share: Share of the split, in [0, 1]; 0 allows none.
        images: So many may be skipped whatever their share, since one image of a small split is a large share; but
            never half of the split.
    """

    share: float
    images: int = 0

    def allow(self, bad: int, total: int) -> bool:
        """Return whether ``bad`` of ``total`` images may be skipped."""
        return bad <= self.share * total or (self.share > 0 and bad <= self.images and 2 * bad < total)


def refuse_if_fatal(
    name: str, split: str, report: VerificationReport, policy: BadImagePolicy, limits: SkipLimits, total: int
) -> None:
    """Raise if bad images are fatal, warn if they are skipped (see :func:`drop_bad`)."""
    if not report.bad:
        return
    if policy == "error":
        raise DataError(f"{name} ({split}): {report}. Mend or remove them, or pass on_bad_image='skip'.")
    if not limits.allow(len(report.bad), total):
        raise DataError(
            f"{name} ({split}): {report}. That is {len(report.bad) / max(total, 1):.1%} of {total}, more "
            f"than the {limits.share:.1%} (max_bad_share) and the {limits.images} images (max_bad_images, of less than "
            "half a split) that may be skipped. Mend or remove them, or raise one of the two."
        )
    warnings.warn(f"{name} ({split}): {report}. They are skipped.", stacklevel=4)


def file_key(data: bytes, decoding: Decoding = DEFAULT_DECODING) -> str:
    """Return the content key of a file's bytes: ``file:``, their sha256, and what a user set for decoding them."""
    return f"file:{hashlib.sha256(data).hexdigest()}{decoding.key}"


def file_stamp(path: Path) -> str:
    """Return the size in bytes and the modification time in ns of a file, ``"absent"`` if there is none."""
    try:
        status = path.stat()
    except OSError:
        return "absent"
    return f"{status.st_size}:{status.st_mtime_ns}"


def _verdict(path: Path, decoding: Decoding) -> tuple[str, str]:
    """Return why a file can't be decoded, empty if it can, and what decoding changes."""
    try:
        key = (file_status(path), decoding)
    except OSError as error:
        return "does not exist" if isinstance(error, FileNotFoundError) else os_reason(error), ""

    if key not in _verdicts:
        try:
            _verdicts[key] = "", walk_file(path, decoding)
        except UndecodableError as error:
            _verdicts[key] = error.reason, ""

    return _verdicts[key]


def pixel_key(image: Image.Image) -> str:
    """Return 32 hex digits of an RGB image's size and pixels: equal for equal images, however they are stored."""
    return hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()[:32]
