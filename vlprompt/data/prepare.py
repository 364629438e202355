"""Getting a data set ready: what is there, what is missing, where it comes from, and fetching it.

Nothing is half there: archives are unpacked beside the root and moved into place when they are whole, the image folder
last; a kill leaves parts that the next call continues from.
"""

from __future__ import annotations

import shutil
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vlprompt.core.errors import DataError
from vlprompt.data.base import ImageDataset
from vlprompt.data.cards import ArchiveSpec, Card, SourceSpec
from vlprompt.data.catalog import open_split
from vlprompt.data.download import Progress, download
from vlprompt.data.images import verify
from vlprompt.data.segmentation.base import MaskDataset
from vlprompt.data.segmentation.catalog import open_pairs
from vlprompt.data.segmentation.guards import pair_problems
from vlprompt.data.sources import AbsentError
from vlprompt.data.splits import SPLITS
from vlprompt.data.unpack import unpack

__all__ = ["Status", "advice", "explain", "fetch", "status"]

_OFFLINE = "digits, scenes/shape and the other scenes need no download"
_OFFLINE_MASKS = "scenes/masks and your own pairs:PATH need no download"


@dataclass(frozen=True)
class Status:
    """What is known of a data set on this disk.

    Attributes:
        state: ``"ready"``, ``"absent"``, or ``"incomplete"``.
        sizes: Images in each part that could be opened.
        problems: What is wrong, one sentence each.
    """

    state: Literal["ready", "absent", "incomplete"]
    sizes: dict[str, int] = field(default_factory=dict)
    problems: tuple[str, ...] = ()


def status(card: Card, root: Path, decode: bool = False) -> Status:
    """Open every part of a data set and compare it with its card.

    Args:
        card: The data set.
        root: Where data sets lie.
        decode: Also decode every image.
    """
    sizes: dict[str, int] = {}
    problems: list[str] = []
    for split in (s for s in SPLITS if s in card.splits.sizes):
        expected = card.splits.sizes[split]
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                masks = card.task == "segmentation"
                data = open_pairs(card.name, split, root) if masks else open_split(card.name, split, root)
        except AbsentError as error:
            return Status("absent", {}, (str(error),))
        except DataError as error:
            return Status("incomplete", sizes, (str(error),))
        problems += [str(w.message) for w in caught if "expected: is it whole" not in str(w.message)]
        sizes[split] = len(data)
        if isinstance(data, MaskDataset):
            sizes[split] = len(data) if card.splits.counts == "pairs" else len(data.images())
        if sizes[split] != expected:
            what = card.splits.counts
            problems.append(f"{split} has {sizes[split]} {what}, the card says {expected}.")
        if decode:
            problems += _damaged(data, split)
    return Status("incomplete" if problems else "ready", sizes, tuple(problems))


def _damaged(data: ImageDataset | MaskDataset, split: str) -> list[str]:
    """Decode everything and return what can't be used."""
    if isinstance(data, MaskDataset):
        return [f"{split}: {problem}" for problem in pair_problems(data)]
    report = verify(data)
    return [f"{split}: {report}."] if report.bad else []


def advice(card: Card, root: Path) -> str:
    """Return what to do about a data set that isn't there: by program, by hand, and what to take instead."""
    if card.archives:
        how = f"Fetch it with `vlprompt data prepare {card.name}`, or pass download=True ({card.download_mb} MB). "
    else:
        how = "Nobody serves it to programs. "
    hand = f"By hand: {_one_line(card.by_hand)} " if card.by_hand else ""
    offline = _OFFLINE_MASKS if card.task == "segmentation" else _OFFLINE
    return f"{how}{hand}(ROOT is {root}, or what root=... or VLPROMPT_DATA say.) Without it: {offline}."


def explain(card: Card) -> str:
    """Return what a person should know before using a data set, several lines."""
    many = "es" if len(card.classnames) != 1 else ""
    lines = [f"{card.name}: {card.title}, {len(card.classnames)} class{many}, {_sizes(card)}"]
    if card.task == "segmentation":
        asked = card.templates[0].format(card.classnames[0])
        lines.append(f"  task: masks of phrases, for example {asked!r}; sizes count {card.splits.counts}")
    lines += [f"  paper: {card.paper}", f"  licence: {card.licence}", f"  measure: {card.metric}"]
    lines += [f"  homepage: {card.homepage}"] if card.homepage else []
    for archive in card.archives:
        lines.append(
            f"  fetches {archive.urls[0]} ({archive.mb} MB, {archive.checksum or 'no checksum known'})"
        )
    if card.splits.file:
        lines.append(f"  split: {card.splits.file} from {card.splits.mirror or card.splits.url}")
    lines += [f"  otherwise: {card.splits.otherwise}"] if card.splits.otherwise else []
    lines += [f"  trap: {trap}" for trap in card.traps]
    lines += [f"  checked: {fact}" for fact in card.verified]
    lines += [f"  by hand: {_one_line(card.by_hand)}"] if card.by_hand else []
    return "\n".join(lines)


def fetch(card: Card, root: Path, progress: Progress | None = None, timeout: float = 30.0) -> Status:
    """Fetch what is missing of a data set: its archives, then its published split file.

    Args:
        card: The data set.
        root: Where data sets lie.
        progress: Told about every block that arrives.
        timeout: Seconds without a byte after which a connection counts as broken.

    Returns:
        Its status afterwards.

    Raises:
        DataError: If it can't be fetched by a program, a download fails, a checksum is wrong, or an archive is
            not what it should be.
    """
    found = status(card, root)
    if found.state == "ready" and (not card.splits.mirror or _split_place(card, root).is_file()):
        return found
    try:
        if found.state == "absent":
            _fetch_archives(card, root, progress, timeout)
        place = _split_place(card, root)
        if card.splits.mirror and not place.is_file():
            download([card.splits.mirror], place, card.splits.checksum, timeout=timeout, progress=progress)
    except (DataError, OSError) as error:
        reason = error if isinstance(error, DataError) else f"{error}."
        raise DataError(
            f"{card.name}: {reason} By hand: {_one_line(card.by_hand)} (ROOT is {root}.)"
        ) from None
    return status(card, root)


def _fetch_archives(card: Card, root: Path, progress: Progress | None, timeout: float) -> None:
    if not card.archives:
        raise DataError("nobody serves it to programs.")
    work = root / ".downloads" / card.name
    fetched = [
        (a, download(a.urls, work / a.file, a.checksum, timeout=timeout, progress=progress))
        for a in card.archives
    ]
    staging = work / "unpacked"
    shutil.rmtree(staging, ignore_errors=True)
    for archive, path in fetched:
        _place(archive, path, staging / archive.into)
    _move_in(staging, root, _image_folders(card))
    shutil.rmtree(work, ignore_errors=True)


def _place(archive: ArchiveSpec, path: Path, folder: Path) -> None:
    """Put a fetched file, or what it holds, into a folder."""
    if not archive.unpack:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / archive.file)
        return
    unpack(path, folder)
    for inner in archive.inner:
        unpack(folder / inner, (folder / inner).parent)
        (folder / inner).unlink()


def _move_in(staging: Path, root: Path, last: set[str]) -> None:
    """Move everything in ``staging`` to the same place below ``root``; folders that exist are merged.

    A data set counts as present once its image folder exists; folders called so go last.

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


def _split_place(card: Card, root: Path) -> Path:
    """Return where the split file is, or belongs."""
    folders = [root / f for f in card.source.options.get("folders", ())]
    places = [f / str(card.splits.file) for f in folders]
    there = [p for p in places if p.is_file()] or [
        p for p, f in zip(places, folders, strict=True) if f.is_dir()
    ]
    return [*there, *places, root / str(card.splits.file)][0]


def _sizes(card: Card) -> str:
    return ", ".join(f"{split} {size}" for split, size in card.splits.sizes.items()) or "sizes unknown"


def _one_line(text: str) -> str:
    return " ".join(text.split())
