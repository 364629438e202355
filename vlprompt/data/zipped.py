"""Images inside zip archives, read where they are; a source is ``archive.zip@path/inside.jpg``."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from PIL import Image

from vlprompt.core.errors import DataError
from vlprompt.core.names import printable
from vlprompt.data.base import Reader
from vlprompt.data.decoding import DEFAULT_DECODING, Decoding, UndecodableError, decode, walk_bytes
from vlprompt.data.images import FileReader, file_key, file_stamp
from vlprompt.data.unpack import DAMAGED

__all__ = ["ZipReader"]

_LARGEST = 1 << 29  # bytes of an image in an archive

_verdicts: dict[tuple[str, str, Decoding], tuple[str, str]] = {}


@dataclass(frozen=True)
class ZipReader(Reader):
    """Reads images from archives in one folder, and those that lie there unpacked.

    Attributes:
        root: The folder.
        decoding: See :func:`vlprompt.data.decoding.read_image`.
    """

    root: Path
    decoding: Decoding = DEFAULT_DECODING

    def with_jpeg_side(self, side: int) -> ZipReader:
        """See :meth:`Reader.with_jpeg_side`."""
        return replace(self, decoding=replace(self.decoding, jpeg_side=side))

    def read(self, source: str) -> Image.Image:
        """Return the image as RGB."""
        archive, _, member = source.partition("@")
        if not member:
            return self._files.read(source)
        data = self._bytes(archive, member)
        return decode(data, source, self.decoding)

    def check(self, source: str) -> str:
        """Return why an image can't be decoded, empty if it can."""
        archive, _, member = source.partition("@")
        if not member:
            return self._files.check(source)

        return self._verdict(archive, member)[0]

    def note(self, source: str) -> str:
        """See :meth:`Reader.note`."""
        archive, _, member = source.partition("@")
        return self._verdict(archive, member)[1] if member else self._files.note(source)

    def key(self, source: str) -> str:
        """Return ``file:`` and the sha256 of the image's bytes, as if it lay unpacked."""
        archive, _, member = source.partition("@")
        if not member:
            return self._files.key(source)
        return file_key(self._bytes(archive, member), self.decoding)

    def stamp(self, source: str) -> str:
        """See :meth:`Reader.stamp`: the archive's, and the name inside it."""
        archive, _, member = source.partition("@")
        return f"{file_stamp(self.root / archive)}@{member}"

    def members(self, archive: str) -> frozenset[str]:
        """Return the names inside an archive. Raises DataError if it can't be read."""
        return frozenset(self._open(archive).NameToInfo)

    @property
    def _files(self) -> FileReader:
        return FileReader(self.root, self.decoding)

    def _verdict(self, archive: str, member: str) -> tuple[str, str]:
        """Return why an image can't be decoded, empty if it can, and what decoding changes; remembered."""
        key = (str(self.root / archive), self.stamp(f"{archive}@{member}"), self.decoding)
        if key not in _verdicts:
            try:
                data = self._bytes(archive, member)
                _verdicts[key] = "", walk_bytes(data, member, self.decoding)
            except UndecodableError as error:
                _verdicts[key] = error.reason, ""
            except DataError as error:
                _verdicts[key] = str(error), ""
        return _verdicts[key]

    def _bytes(self, archive: str, member: str) -> bytes:
        packed = self._open(archive)
        try:
            size = packed.getinfo(member).file_size
            if size > _LARGEST:
                raise DataError(f"{member!r} of {self.root / archive} has {size:,} bytes: no image.")
            return packed.read(member)
        except KeyError:
            raise DataError(f"{self.root / archive} holds no {member!r}.") from None
        except (
            OSError,
            *DAMAGED,
        ) as error:  # NotImplementedError, of an unknown way of packing, is a RuntimeError
            reason = printable(str(error)) or type(error).__name__
            raise DataError(f"can't read {printable(member)!r} of {self.root / archive}: {reason}.") from None

    def _open(self, archive: str) -> zipfile.ZipFile:
        path = self.root / archive
        try:
            # Size and time are part of the cache's key: an archive that was replaced is opened again.
            stat = path.stat()
            return _open(str(path), stat.st_size, stat.st_mtime_ns)
        except (OSError, *DAMAGED) as error:
            reason = printable(str(error)) or type(error).__name__
            raise DataError(f"can't read the archive {path}: {reason}.") from None


@lru_cache(maxsize=16)
def _open(path: str, size: int, changed: int) -> zipfile.ZipFile:
    """Open an archive once per process; a ZipFile locks its file for threads."""
    return zipfile.ZipFile(path)
