"""Unpacking zip, tar and gz so that nothing leaves the folder: no path above it, none absolute, no link out of it."""

from __future__ import annotations

import errno
import gzip
import lzma
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

from vlprompt.core.errors import DataError
from vlprompt.core.names import printable
from vlprompt.data.splits import is_inside

__all__ = ["DAMAGED", "unpack"]

# What Python's readers raise at damaged archives.
DAMAGED = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    gzip.BadGzipFile,
    EOFError,
    ValueError,
    RuntimeError,
    OverflowError,
)
_TAR = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")


def unpack(archive: Path, folder: Path) -> None:
    """Unpack an archive into a folder. Every name in it is checked before anything is written.

    Args:
        archive: A zip, a tar (packed or not), or one gzipped file.
        folder: Where to; created if missing.

    Raises:
        DataError: If a member would leave the folder, is neither file, folder nor a link inside, the archive is
            damaged, or the disk is too small.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if archive.name.endswith(_TAR):
            _tar(archive, folder)
        elif archive.name.endswith(".zip"):
            _zip(archive, folder)
        elif archive.name.endswith(".gz"):
            with gzip.open(archive, "rb") as packed, (folder / archive.stem).open("wb") as file:
                shutil.copyfileobj(packed, file)
        else:
            raise DataError(f"{archive} is no archive of a known kind: {', '.join((*_TAR, '.zip', '.gz'))}.")
    except DataError:
        raise
    except NotImplementedError as error:  # a way of packing that Python doesn't know, such as Deflate64
        raise DataError(f"the archive {archive} can't be unpacked here: {error}. Pack it anew.") from None
    except KeyError as error:  # a link to a member that is not there
        raise DataError(f"the archive {archive} is damaged: {error.args[0]}.") from None
    except DAMAGED as error:
        reason = str(error) or type(error).__name__
        raise DataError(f"the archive {archive} is damaged: {printable(reason)}.") from None
    except OSError as error:
        raise DataError(
            f"{archive.name} could not be unpacked into {folder}: {error.strerror or error}."
        ) from None


def _tar(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as packed:
        members = packed.getmembers()
        for member in members:
            _check_name(archive, member.name)
            if not (member.isfile() or member.isdir() or member.issym() or member.islnk()):
                raise DataError(
                    f"{archive} holds {member.name!r}, which is no file, folder or link: refused."
                )
            if member.issym() or member.islnk():
                _check_link(archive, folder, member)

        # Everything is checked before anything is written.
        _check_space(archive, folder, sum(m.size for m in members))
        for member in members:
            member.mode = 0o755 if member.isdir() else 0o644
            # One by one: a link that an earlier member made must not lead a later one out.
            _check_place(archive, folder, folder / member.name)
            if hasattr(tarfile, "data_filter"):
                packed.extract(member, folder, set_attrs=False, filter="data")
            else:
                packed.extract(member, folder, set_attrs=False)
            if member.issym():
                _refuse_circle(archive, folder / member.name)


def _refuse_circle(archive: Path, link: Path) -> None:
    """Remove and refuse a link that leads to itself."""
    try:
        link.stat()
    except OSError as error:
        if error.errno != errno.ELOOP:  # it may lead to a member that comes later
            return
        link.unlink()
        raise DataError(f"{archive} holds the link {link.name!r}, which leads to itself: refused.") from None


def _zip(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as packed:
        members = packed.infolist()
        for member in members:
            _check_name(archive, member.filename)
            if stat.S_ISLNK(member.external_attr >> 16):
                raise DataError(f"{archive} holds the link {member.filename!r}: refused.")
            if member.flag_bits & 1:
                raise DataError(f"{archive} is encrypted ({member.filename!r}).")
        _check_space(archive, folder, sum(m.file_size for m in members))
        for member in members:
            _check_place(archive, folder, folder / member.filename)
            packed.extract(member, folder)


def _check_name(archive: Path, name: str) -> None:
    if not is_inside(name):
        raise DataError(f"{archive} holds {name!r}, which leaves the folder: refused, nothing was unpacked.")


def _check_link(archive: Path, folder: Path, member: tarfile.TarInfo) -> None:
    """Refuse links whose target is not below the folder (a hard link's is a member's name)."""
    start = folder / member.name if member.issym() else folder / "x"
    target = (start.parent / member.linkname).resolve()
    if member.linkname.startswith("/") or not target.is_relative_to(folder.resolve()):
        raise DataError(
            f"{archive} holds a link {member.name!r} to {member.linkname!r}, out of the folder: refused."
        )


def _check_place(archive: Path, folder: Path, path: Path) -> None:
    if not path.parent.resolve().is_relative_to(folder.resolve()):
        raise DataError(f"{archive}: {path} lies behind a link that leaves the folder: refused.")


def _check_space(archive: Path, folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DataError(
            f"{archive.name} unpacks to {needed / 1e9:.1f} GB, but {folder} has {free / 1e9:.1f} GB free."
        )
