"""Getting a data set ready: what is there, what is missing, where it comes from, and fetching it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vlprompt.core.errors import DataError
from vlprompt.data.base import ImageDataset
from vlprompt.data.cards import Card
from vlprompt.data.catalog import open_split
from vlprompt.data.descriptions import PUBLIC_DESCRIPTIONS
from vlprompt.data.download import Progress
from vlprompt.data.fetch import fetch_files, one_line, split_path
from vlprompt.data.images import verify
from vlprompt.data.segmentation.base import MaskDataset
from vlprompt.data.segmentation.catalog import open_pairs
from vlprompt.data.segmentation.guards import pair_problems
from vlprompt.data.sources import AbsentError
from vlprompt.data.splits import SPLITS

__all__ = ["Status", "explain", "fetch", "status"]


@dataclass(frozen=True)
class Status:
    """What a look at the disk says about a data set.

    Attributes:
        state: ``"ready"``, ``"absent"``, or ``"incomplete"``.
        sizes: Number of images (or pairs) in each split that could be opened.
        problems: What is wrong, one sentence each.
    """

    state: Literal["ready", "absent", "incomplete"]
    sizes: dict[str, int] = field(default_factory=dict)
    problems: tuple[str, ...] = ()


def status(card: Card, root: Path, decode: bool = False) -> Status:
    """Open every split of a data set and compare it with its card.

    Args:
        card: The data set.
        root: Folder of downloaded data sets.
        decode: Also decode every image.
    """
    sizes: dict[str, int] = {}
    problems: list[str] = []
    for split in SPLITS:
        if split not in card.splits.sizes:
            continue
        try:
            data, messages = _open(card, split, root)
        except AbsentError as error:
            return Status("absent", {}, (str(error),))
        except DataError as error:
            return Status("incomplete", sizes, (str(error),))
        sizes[split] = _size(data, card)

        # A wrong number of images is a problem below already.
        problems += [message for message in messages if "expected: is it whole" not in message]
        expected = card.splits.sizes[split]
        if sizes[split] != expected:
            problems.append(f"{split} has {sizes[split]} {card.splits.counts}, the card says {expected}.")
        if decode:
            problems += _damaged(data, split)
    return Status("incomplete" if problems else "ready", sizes, tuple(problems))


def fetch(card: Card, root: Path, progress: Progress | None = None, timeout: float = 30.0) -> Status:
    """Fetch what is missing of a data set: its archives, then its published split file.

    Args:
        card: The data set.
        root: Folder of downloaded data sets.
        progress: Called for every block that arrives.
        timeout: Seconds without a byte after which a connection counts as broken.

    Returns:
        Its status afterwards.

    Raises:
        DataError: See :func:`vlprompt.data.fetch.fetch_files`.
    """
    before = status(card, root)
    split_is_there = not card.splits.mirror or split_path(card, root).is_file()
    if before.state == "ready" and split_is_there:
        return before
    # Archives of an incomplete data set are not fetched again: its owner may have mended or moved files.
    fetch_files(card, root, archives=before.state == "absent", progress=progress, timeout=timeout)
    return status(card, root)


def explain(card: Card) -> str:
    """Return what a user should know before using a data set, in several lines."""
    classes = "1 class" if len(card.classnames) == 1 else f"{len(card.classnames)} classes"
    sizes = ", ".join(f"{split} {size}" for split, size in card.splits.sizes.items()) or "sizes unknown"
    lines = [f"{card.name}: {card.title}, {classes}, {sizes}"]
    if card.task == "segmentation":
        phrase = card.templates[0].format(card.classnames[0])
        lines.append(f"  task: masks of phrases, for example {phrase!r}; sizes count {card.splits.counts}")
    lines.append(f"  paper: {card.paper}")
    lines.append(f"  licence: {card.licence}")
    lines.append(f"  measure: {card.metric}")
    if card.homepage:
        lines.append(f"  homepage: {card.homepage}")

    for archive in card.archives:
        checksum = archive.checksum or "no checksum known"
        lines.append(f"  fetches {archive.urls[0]} ({archive.mb} MB, {checksum})")
    if card.splits.file:
        lines.append(f"  split: {card.splits.file} from {card.splits.mirror or card.splits.url}")
    if card.splits.otherwise:
        lines.append(f"  otherwise: {card.splits.otherwise}")

    if card.task == "classification":
        lines += [f"  descriptions of classes: {line}" for line in PUBLIC_DESCRIPTIONS]

    lines += [f"  trap: {trap}" for trap in card.traps]
    lines += [f"  checked: {fact}" for fact in card.verified]
    if card.by_hand:
        lines.append(f"  by hand: {one_line(card.by_hand)}")
    return "\n".join(lines)


def _open(card: Card, split: str, root: Path) -> tuple[ImageDataset | MaskDataset, list[str]]:
    """Return a split and the warnings about it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if card.task == "segmentation":
            data: ImageDataset | MaskDataset = open_pairs(card.name, split, root)
        else:
            data = open_split(card.name, split, root)
    return data, [str(warning.message) for warning in caught]


def _size(data: ImageDataset | MaskDataset, card: Card) -> int:
    if isinstance(data, MaskDataset) and card.splits.counts == "images":
        return len(data.images())
    return len(data)


def _damaged(data: ImageDataset | MaskDataset, split: str) -> list[str]:
    """Decode everything and return what can't be used."""
    if isinstance(data, MaskDataset):
        return [f"{split}: {problem}" for problem in pair_problems(data)]
    report = verify(data)
    return [f"{split}: {report}."] if report.bad else []
