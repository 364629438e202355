"""Archives as files that can be read anywhere: plain ones where they lie, compressed ones unpacked beside."""

from __future__ import annotations

import bz2
import glob
import gzip
import io
import lzma
import os
import re
import tarfile
import tempfile
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote, urlsplit

from typing_extensions import Self

from vlprompt.core.errors import DataError
from vlprompt.core.paths import user_path
from vlprompt.data.sources import AbsentError

__all__ = ["Archive", "WholeMember", "find_archives", "open_unpacked"]

_OPENERS: dict[bytes, Callable[[Path], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
}
_ZSTANDARD = b"\x28\xb5\x2f\xfd"
_CHUNK = 1 << 20  # bytes
_LARGEST_GROWTH = 50  # images hardly shrink; what grows more, beyond the allowance, is meant to fill the disk
_ALLOWANCE = 64 << 20  # bytes
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MOST_NAMES = 100_000


@dataclass(frozen=True)
class Archive:
    """One archive.

    Attributes:
        path: Its file.
        size: In bytes, unpacked.
    """

    path: Path
    size: int
    _unpacked: IO[bytes] | None = field(default=None, compare=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, compare=False, repr=False)

    @classmethod
    def of(cls, path: Path) -> Archive:
        """Return the archive of a file.

        Raises:
            DataError: If it is no regular file, can't be read, or can't be unpacked.
        """
        if not path.is_file():
            raise DataError(f"{path} is no regular file.")
        try:
            opener = _opener(path)
            return cls(path, path.stat().st_size) if opener is None else cls._compressed(path, opener)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise DataError(f"{path} is no readable tar file: {error}.") from None

    @classmethod
    def _compressed(cls, path: Path, opener: Callable[[Path], Any]) -> Archive:
        most = path.stat().st_size * _LARGEST_GROWTH + _ALLOWANCE
        unpacked: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  # it goes with the archive
        size = 0
        with opener(path) as packed:
            while chunk := packed.read(_CHUNK):
                size += len(chunk)
                if size > most:
                    raise DataError(f"{path} would unpack to more than {most >> 20} MiB: refused.")
                unpacked.write(chunk)

        unpacked.flush()
        return cls(path, size, unpacked)

    def __reduce__(self) -> tuple[Callable[[Path], Archive], tuple[Path]]:
        # Another process opens it anew: neither locks nor temporary files can be sent.
        return Archive.of, (self.path,)

    def open(self) -> IO[bytes]:
        """Return the unpacked bytes as a file at its beginning; closing it closes nothing else."""
        if self._unpacked is None:
            return self.path.open("rb")
        return io.BufferedReader(_View(self))

    def read(self, offset: int, length: int) -> bytes:
        """Return bytes of the unpacked archive; several threads and forked processes may read at once."""
        if self._unpacked is None:
            with self.path.open("rb") as file:
                file.seek(offset)
                return file.read(length)
        if hasattr(os, "pread"):  # forked processes share the position of a file
            return os.pread(self._unpacked.fileno(), length, offset)
        with self._lock:
            self._unpacked.seek(offset)
            return self._unpacked.read(length)


class _View(io.RawIOBase):
    """An unpacked archive as a file with a position of its own."""

    def __init__(self, archive: Archive) -> None:
        self._archive = archive
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._archive.size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self._archive.read(self._position, len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


class WholeMember(tarfile.TarInfo):
    """A member of an archive; tarfile takes a damaged header for the end, which would drop all that is behind it."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        """Read the next header.

        Raises:
            tarfile.ReadError: If it is damaged.
            tarfile.HeaderError: If it is the end.
        """
        try:
            return super().fromtarfile(archive)
        except _ENDS:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} at byte {archive.offset}") from None


_ENDS = (tarfile.EOFHeaderError, tarfile.EmptyHeaderError)  # type: ignore[attr-defined]


def open_unpacked(path: Path) -> IO[bytes]:
    """Return a file's unpacked bytes, which are read once and forwards; checksums are compared at the end.

    Raises:
        DataError: If it can't be unpacked here.
        OSError: If it can't be read.
    """
    opener = _opener(path) or Path.open
    file: IO[bytes] = opener(path, "rb")
    return file


def _opener(path: Path) -> Callable[..., Any] | None:
    """Return what opens a compressed file; None for one that isn't."""
    with path.open("rb") as file:
        start = file.read(6)
    if start.startswith(_ZSTANDARD):
        raise DataError(f"{path} is compressed by zstd, which can't be read here. Run: unzstd {path}")
    return next((opener for magic, opener in _OPENERS.items() if start.startswith(magic)), None)


def find_archives(argument: str, title: str) -> list[Path]:
    """Return the archives that a path, a pattern or a ``file:`` address means, in the order of their names.

    Args:
        argument: What stands behind ``tar:``.
        title: The whole name, for messages.

    Raises:
        AbsentError: If nothing matches.
        DataError: If it is an address of the web.
    """
    text = _local(argument, title)
    names: list[str] = []
    for name in _expanded(str(user_path(text)), title):
        names += [name] if Path(name).exists() else sorted(glob.glob(_escaped(name)))
    if not names:
        raise AbsentError(f"{title}: no archive matches.")
    return [Path(name) for name in dict.fromkeys(names)]


def _escaped(pattern: str) -> str:
    """Return a pattern whose folders that exist are taken as written, brackets and all."""
    path = Path(pattern)
    literal = next((parent for parent in path.parents if parent.is_dir()), Path())
    return str(Path(glob.escape(str(literal)), path.relative_to(literal)))


def _local(argument: str, title: str) -> str:
    """Return the path of a ``file:`` address; other texts are paths already."""
    if re.match(r"file:", argument, re.I):
        parts = urlsplit(argument)
        if parts.netloc not in ("", "localhost"):
            raise DataError(f"{title}: {parts.netloc} is another machine. Download the archives first.")
        return unquote(parts.path)
    if re.match(r"([a-z][a-z0-9+.-]+://|pipe:)", argument, re.I):
        raise DataError(f"{title}: nothing is read from the web here. Download the archives first.")
    return argument


def _expanded(pattern: str, title: str) -> list[str]:
    """Return the names that ``{00..12}`` stands for, as webdataset writes it; numbers keep their width."""
    match = _BRACES.search(pattern)
    if match is None or Path(pattern).exists():
        return [pattern]

    first, last = match.groups()
    if not 0 <= int(last) - int(first) < _MOST_NAMES:
        raise DataError(f"{title}: {match[0]} must count up, by {_MOST_NAMES} at most.")
    names: list[str] = []
    for number in range(int(first), int(last) + 1):
        name = f"{pattern[: match.start()]}{number:0{len(first)}d}{pattern[match.end() :]}"
        names += _expanded(name, title)
    return names
