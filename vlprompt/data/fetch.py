"""Fetching the files of a data set.

Nothing is half there: archives are unpacked beside the root and moved into place when they are whole, the image folder
last. After a kill, the next call continues from the parts that are there.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from vlprompt.core.errors import DataError
from vlprompt.data.cards import ArchiveSpec, Card, SourceSpec
from vlprompt.data.download import Progress, download
from vlprompt.data.unpack import unpack

__all__ = ["advice", "fetch_files", "one_line", "split_path"]

_OFFLINE = "digits, scenes/shape and the other scenes need no download"
_OFFLINE_MASKS = "scenes/masks and your own pairs:PATH need no download"


def advice(card: Card, root: Path) -> str:
    """Return what to do about a data set that isn't there: the command, the way by hand, and an alternative."""
    if card.archives:
        size = f"{card.download_mb} MB"
        how = f"Fetch it with `vlprompt data prepare {card.name}`, or pass download=True ({size}). "
    else:
        how = "It can't be downloaded automatically. "
    by_hand = f"By hand: {one_line(card.by_hand)} " if card.by_hand else ""
    offline = _OFFLINE_MASKS if card.task == "segmentation" else _OFFLINE
    return f"{how}{by_hand}(ROOT is {root}, or what root=... or VLPROMPT_DATA say.) Without it: {offline}."


def fetch_files(
    card: Card, root: Path, *, archives: bool, progress: Progress | None = None, timeout: float = 30.0
) -> None:
    """Fetch the archives of a data set and its published split file.

    Args:
        card: The data set.
        root: Folder of downloaded data sets.
        archives: Whether the archives are needed; the split file is fetched whenever it isn't there.
        progress: Called for every block that arrives.
        timeout: Seconds without a byte after which a connection counts as broken.

    Raises:
        DataError: If it can't be fetched by a program, a download fails, a checksum is wrong, or an archive is
            not what it should be; says how to get it by hand.
    """
    try:
        if archives:
            _fetch_archives(card, root, progress, timeout)
        path = split_path(card, root)
        if card.splits.mirror and not path.is_file():
            download([card.splits.mirror], path, card.splits.checksum, timeout=timeout, progress=progress)
    except (DataError, OSError) as error:
        reason = error if isinstance(error, DataError) else f"{error}."
        raise DataError(
            f"{card.name}: {reason} By hand: {one_line(card.by_hand)} (ROOT is {root}.)"
        ) from None


def split_path(card: Card, root: Path) -> Path:
    """Return the path of the published split file: where it is, or where it belongs."""
    name = str(card.splits.file)
    folders = [root / folder for folder in card.source.options.get("folders", ())]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    for folder in folders:
        if folder.is_dir():
            return folder / name
    return folders[0] / name if folders else root / name


def one_line(text: str) -> str:
    """Return a text without line breaks."""
    return " ".join(text.split())


def _fetch_archives(card: Card, root: Path, progress: Progress | None, timeout: float) -> None:
    if not card.archives:
        raise DataError("it can't be downloaded automatically.")
    work = root / ".downloads" / card.name
    staging = work / "unpacked"

    # Everything is downloaded before anything is unpacked: a missing archive is noticed early.
    files = []
    for archive in card.archives:
        path = work / archive.file
        files.append(download(archive.urls, path, archive.checksum, timeout=timeout, progress=progress))

    shutil.rmtree(staging, ignore_errors=True)
    for archive, path in zip(card.archives, files, strict=True):
        _unpack_into(staging / archive.into, archive, path)
    _move_in(staging, root, _image_folders(card))
    shutil.rmtree(work, ignore_errors=True)


def _unpack_into(folder: Path, archive: ArchiveSpec, path: Path) -> None:
    """Put a fetched file, or its content, into a folder."""
    if not archive.unpack:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / archive.file)
        return
    unpack(path, folder)
    for inner in archive.inner:
        unpack(folder / inner, (folder / inner).parent)
        (folder / inner).unlink()


def _move_in(staging: Path, root: Path, last: set[str]) -> None:
    """Move everything in ``staging`` to the same path below ``root``; folders that exist are merged.

    A data set counts as present once its image folder exists; folders with the names ``last`` are moved last.

    Raises:
        DataError: If another file is in the way.
    """
    for path in sorted(staging.iterdir(), key=lambda p: (p.name in last, p.name)):
        target = root / path.name
        if not target.exists():
            root.mkdir(parents=True, exist_ok=True)
            shutil.move(path, target)  # the target may be a link to another disk
        elif path.is_dir() and target.is_dir():
            _move_in(path, target, last)
        elif not path.is_file() or path.read_bytes() != target.read_bytes():
            raise DataError(f"{target} is in the way; move it elsewhere.")


def _image_folders(card: Card) -> set[str]:
    names: set[str] = set()
    source: SourceSpec | None = card.source
    while source is not None:
        names |= set(Path(str(source.options.get("images", ""))).parts[:1])
        source = source.otherwise
    return names
