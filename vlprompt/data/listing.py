"""The one listing of images, for every tool: sorted, links followed, and what is left out named with its reason.

Left out are hidden files, what macOS and Jupyter leave in folders, files that are no images, and everything that is no
regular file: pipes, sockets, devices, links to nothing or to themselves.
"""

from __future__ import annotations

import errno
import os
import unicodedata
import warnings
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vlprompt.core.errors import DataError
from vlprompt.core.names import listed_names, printable
from vlprompt.data.decoding import file_kind
from vlprompt.data.images import EXTENSIONS

__all__ = [
    "LINKS",
    "Links",
    "Listing",
    "Skipped",
    "is_hidden",
    "list_folder",
    "list_folders",
    "list_images",
    "spelled_on_disk",
    "walk",
]

Links = Literal["follow", "forbid"]
LINKS = ("follow", "forbid")

HIDDEN = "hidden, or left by an operating system or an editor"
NO_IMAGE = "no image by its ending"

# What holds images to a user and can't be read here: other formats, films, archives. Leaving it out is said.
_OTHER_IMAGES = frozenset(
    (
        ".ai", ".arw", ".cr2", ".cr3", ".dcm", ".dng", ".eps", ".exr", ".hdr", ".jxl", ".nef", ".nii", ".npy", ".orf",
        ".pdf", ".psd", ".raf", ".raw", ".rw2", ".svg", ".xcf",
        ".arrow", ".avi", ".h5", ".hdf5", ".lmdb", ".mkv", ".mov", ".mp4", ".npz", ".parquet", ".tfrecord", ".webm",
        ".7z", ".bz2", ".gz", ".rar", ".tar", ".tgz", ".xz", ".zip", ".zst",
    )
)  # fmt: skip
_LEFT_BY_OTHERS = frozenset(("__macosx", "thumbs.db", "desktop.ini", "@eadir", "$recycle.bin"))
_FOLDER = "a folder"
_MAX_VISITS = 16  # of one folder by several links: links in a circle have no end of paths
_Identity = tuple[int, int]  # device and inode
_SHOWN = 3  # names in a warning, for each reason


@dataclass(frozen=True)
class Skipped:
    """An entry that is left out: its path relative to the root, with ``/``, and why."""

    name: str
    reason: str

    @property
    def is_expected(self) -> bool:
        """Whether nobody would miss it: hidden, or text beside images."""
        ending = os.path.splitext(self.name)[1].lower()
        return self.reason == HIDDEN or (self.reason == NO_IMAGE and ending not in _OTHER_IMAGES)


@dataclass
class Listing:
    """What lies below a folder.

    Attributes:
        images: Paths of the images relative to the root, with ``/``, in byte order.
        skipped: Everything else that is no folder.
    """

    images: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)

    def warn(self, root: Path) -> None:
        """Say what was left out and a user might miss, with counts."""
        missed = [entry for entry in self.skipped if not entry.is_expected]
        counts = Counter(entry.reason for entry in missed)
        for reason, count in counts.items():
            names = listed_names((entry.name for entry in missed if entry.reason == reason), _SHOWN)
            what = "entry is" if count == 1 else "entries are"
            warnings.warn(
                f"{printable(str(root))}: {count} {what} left out, {reason}: {names}.", stacklevel=4
            )


def is_hidden(name: str) -> bool:
    """Return whether an entry of this name is nobody's data: hidden, or left by macOS, Windows or Jupyter."""
    return name.startswith(".") or name.lower() in _LEFT_BY_OTHERS


def list_folder(
    folder: Path, root: Path, extensions: Sequence[str] = EXTENSIONS, links: Links = "follow"
) -> Listing:
    """Return all images below a folder, and what else lies there.

    Args:
        folder: Where to look, at any depth. Links to files and folders are followed.
        root: What paths are relative to.
        extensions: Endings that count as images, lower case with the dot.
        links: ``"forbid"`` refuses every link.

    Raises:
        DataError: If the folder can't be listed, or a link is there that is forbidden; names it.
    """
    listing = Listing()
    for entry in walk(folder, root, extensions, links):
        if isinstance(entry, Skipped):
            listing.skipped.append(entry)
        else:
            listing.images.append(entry)

    # Bytes, not characters: the order does not depend on the locale.
    listing.images.sort(key=os.fsencode)
    listing.skipped.sort(key=lambda entry: os.fsencode(entry.name))
    return listing


def list_images(
    folder: Path, root: Path, extensions: Sequence[str] = EXTENSIONS, links: Links = "follow"
) -> list[str]:
    """Return the images of :func:`list_folder`, and warn of what was left out and a user might miss."""
    listing = list_folder(folder, root, extensions, links)
    listing.warn(root)
    return listing.images


def list_folders(folder: Path, root: Path, links: Links = "follow") -> list[Path]:
    """Return the visible subfolders in byte order of their names; links to folders are followed.

    Raises:
        DataError: See :func:`list_folder`.
    """
    try:
        entries = _entries(folder)
    except OSError as error:
        raise _unlistable(folder, error) from None

    on_the_way = {_identity(path.stat()) for path in (folder, *folder.parents) if path.is_relative_to(root)}
    folders = []
    for entry in entries:
        if is_hidden(entry.name) or not os.path.isdir(entry.path):
            continue
        _check_link(entry, root, links)
        if _identity(os.stat(entry.path)) not in on_the_way:
            folders.append(Path(entry.path))
    return folders


def spelled_on_disk(root: Path, path: str) -> str:
    """Return a relative path as it is spelled on disk, where it differs in Unicode's form only.

    macOS decomposes accented letters in the names of files; tables that were written elsewhere compose them.
    """
    if path.isascii() or (root / path).exists():
        return path
    for form in ("NFC", "NFD"):
        spelling = unicodedata.normalize(form, path)
        if (root / spelling).exists():
            return spelling
    return path


def walk(
    folder: Path, root: Path, extensions: Sequence[str] = EXTENSIONS, links: Links = "follow"
) -> Iterator[str | Skipped]:
    """Yield what :func:`list_folder` returns one by one, in no order: images as paths, the rest as :class:`Skipped`.

    Memory grows with the number of folders only. Links may lead back to a folder on the way, or often to the same one.

    Raises:
        DataError: See :func:`list_folder`.
    """
    endings = tuple(extensions)
    visits: Counter[_Identity] = Counter()
    waiting: deque[tuple[Path, frozenset[_Identity]]] = deque([(folder, frozenset())])

    while waiting:
        current, above = waiting.pop()
        try:
            identity = _identity(current.stat())
            entries = _entries(current)
        except OSError as error:
            if current == folder:
                raise _unlistable(folder, error) from None
            yield Skipped(_relative(current, root), f"can't be listed ({error.strerror})")
            continue

        visits[identity] += 1
        if identity in above or visits[identity] > _MAX_VISITS:
            reason = (
                "a link to a folder that it lies in" if identity in above else "one of many links to a folder"
            )
            yield Skipped(_relative(current, root), reason)
            continue

        prefix = "" if current == root else f"{_relative(current, root)}/"
        for entry in entries:
            _check_link(entry, root, links)
            name = f"{prefix}{entry.name}"
            reason = _reason(entry, endings)
            if reason == _FOLDER:
                below = (Path(entry.path), above | {identity})
                if entry.is_symlink():
                    waiting.appendleft(below)  # after all folders that are none
                else:
                    waiting.append(below)
            else:
                yield Skipped(name, reason) if reason else name


def _reason(entry: os.DirEntry[str], extensions: tuple[str, ...]) -> str:
    """Return why an entry is no image, empty if it is one."""
    if is_hidden(entry.name):
        return HIDDEN
    kind = _kind(entry)
    if kind:
        return kind
    return "" if os.path.splitext(entry.name)[1].lower() in extensions else NO_IMAGE


def _unlistable(folder: Path, error: OSError) -> DataError:
    return DataError(f"can't list the folder {printable(str(folder))}: {error.strerror}.")


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """Return a folder's entries in byte order. Raises OSError if it can't be listed."""
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: os.fsencode(entry.name))


def _kind(entry: os.DirEntry[str]) -> str:
    """Return what an entry is, or what its link leads to: empty for a regular file, else words for a reason."""
    try:
        if entry.is_file():  # without a further look at the disk, for what is no link
            return ""
        return file_kind(entry.stat().st_mode)
    except FileNotFoundError:
        return "a link to nothing"
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "a link that leads to itself"
        return f"nothing that can be looked at ({error.strerror})"


def _check_link(entry: os.DirEntry[str], root: Path, links: Links) -> None:
    if links == "forbid" and not is_hidden(entry.name) and entry.is_symlink():
        raise DataError(
            f"{printable(str(root))}: {printable(entry.path)} is a symbolic link, and links='forbid'. Copy the file "
            "there, or pass links='follow'."
        )


def _identity(status: os.stat_result) -> _Identity:
    return status.st_dev, status.st_ino


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()
