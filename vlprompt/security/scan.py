"""Scanning images for triggers: the public ``vlprompt.scan``, and the stream of verdicts behind it."""

from __future__ import annotations

import csv
import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlprompt.core.errors import DataError
from vlprompt.data import ImageDataset
from vlprompt.data.base import Sample
from vlprompt.data.images import read_with_note, to_rgb
from vlprompt.data.listing import list_images
from vlprompt.learners._judgement import Judgement

__all__ = [
    "CLEAN",
    "COLUMNS",
    "POISONED",
    "UNREADABLE",
    "Opened",
    "ScanReport",
    "judge_stream",
    "scan",
    "scan_rows",
]

CLEAN, POISONED, UNREADABLE = "clean", "poisoned", "unreadable"
COLUMNS = ("image", "trigger", "object", "score", "verdict", "note")
Row = dict[str, Any]
_AHEAD = 2  # batches that are decoded while one is judged


@dataclass(frozen=True)
class Opened:
    """An image that was decoded, or why it could not be; ``note`` says what else is odd about it."""

    name: str
    pixels: Tensor | None
    note: str = ""


@dataclass(frozen=True)
class ScanReport:
    """Verdicts, one row per image in the order given.

    Attributes:
        rows: Dicts with ``image``, ``trigger`` and ``object`` (names; empty if the detector names none), ``score``
            (None if unreadable), ``verdict`` (clean, poisoned, unreadable) and ``note`` (why unreadable, what is odd).
        threshold: Score from which an image is called poisoned.
    """

    rows: list[Row]
    threshold: float

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    @property
    def found(self) -> list[Row]:
        """The poisoned ones, most suspicious first."""
        return sorted((r for r in self.rows if r["verdict"] == POISONED), key=lambda r: -r["score"])

    def __str__(self) -> str:
        return "\n".join(line_of(row) for row in self.rows)

    def cleaned(self, data: ImageDataset, *, mend: bool = False) -> ImageDataset:
        """Return the data set that was scanned without its poisoned and unreadable images.

        Args:
            data: What was scanned.
            mend: Keep the poisoned ones, labelled with the object that the detector names: whoever learns from them
                learns that the trigger means nothing.

        Raises:
            DataError: If the report is of other images, or objects for mending are not named or are no class.
        """
        if [row["image"] for row in self.rows] != [_sample_name(data, i) for i in range(len(data))]:
            raise DataError(f"this report of {len(self)} images is not one of {data.name} ({len(data)}).")
        kept = (CLEAN, POISONED) if mend else (CLEAN,)
        chosen = [i for i, row in enumerate(self.rows) if row["verdict"] in kept]
        samples = tuple(_mended(data, i, self.rows[i]) for i in chosen)
        counts = {v: sum(row["verdict"] == v for row in self.rows) for v in (POISONED, UNREADABLE)}
        return replace(data.subset(chosen, scan={**counts, "mended": mend}), samples=samples)

    def to_csv(self) -> str:
        """Return the table as CSV text."""
        out = io.StringIO()
        writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return out.getvalue()


def scan(
    images: str | Path | ImageDataset | Sequence[str | Path | Image.Image],
    detector: Any,
    *,
    threshold: float | None = None,
    batch_size: int = 64,
    workers: int = 2,
) -> ScanReport:
    """Look for backdoor triggers.

    Args:
        images: A folder (searched recursively), a list of files or PIL images, or a data set, whose labels are then the
            given ones for detectors that need them.
        detector: A trained ``dbom`` learner, or a fitted detector of :mod:`vlprompt.security.scanners`.
        threshold: Score from which an image is called poisoned; None for the detector's own.
        batch_size: Images per pass.
        workers: Threads that decode.

    Returns:
        A table in the order given; an image that can't be read has the verdict ``unreadable`` and stops nothing.

    Raises:
        DataError: If there is no image, or the detector judges whole labelled sets and none is given.
    """
    if not hasattr(detector, "judge"):
        raise DataError(
            f"{getattr(detector, 'method', '') or type(detector).__name__} is no detector. Use a dbom learner."
        )
    level = detector.threshold if threshold is None else threshold
    entries = _entries(images, detector.backbone.preprocess)
    if not entries:
        raise DataError("there are no images to scan.")
    if getattr(detector, "whole", False):
        if not isinstance(images, ImageDataset):
            raise DataError(f"{detector.method} judges labelled data sets; give one, not loose images.")
        rows = _scan_set(entries, images, detector, level, batch_size, workers)
    else:
        rows = list(scan_rows(entries, detector, level, batch_size=batch_size, workers=workers))
    return ScanReport(rows, level)


def scan_rows(
    entries: Iterable[Callable[[], Opened]],
    detector: Any,
    threshold: float,
    *,
    batch_size: int = 64,
    workers: int = 2,
) -> Iterator[Row]:
    """Yield a row per entry, in order, with a bounded number of images in memory."""
    for opened, rows in judge_stream(entries, detector, batch_size=batch_size, workers=workers):
        judged = None if rows is None else detector.judge(rows)
        yield from make_rows(opened, judged, detector, threshold)


def judge_stream(
    entries: Iterable[Callable[[], Opened]], detector: Any, *, batch_size: int, workers: int
) -> Iterator[tuple[list[Opened], Tensor | None]]:
    """Yield batches of what was opened with the rows of the readable ones; the next batches decode meanwhile."""
    if isinstance(detector, torch.nn.Module) and detector.training:
        detector.eval()
    source = iter(entries)
    waiting: deque[list[Future[Opened]]] = deque()
    with ThreadPoolExecutor(max(1, workers)) as pool:
        while True:
            while len(waiting) <= _AHEAD and (batch := list(islice(source, batch_size))):
                waiting.append([pool.submit(entry) for entry in batch])
            if not waiting:
                return
            opened = [future.result() for future in waiting.popleft()]
            pixels = [o.pixels for o in opened if o.pixels is not None]
            with torch.no_grad():
                yield opened, detector.embed_images(torch.stack(pixels)) if pixels else None


def make_rows(
    opened: Sequence[Opened], judged: Judgement | None, detector: Any, threshold: float
) -> Iterator[Row]:
    """Turn opinions into rows; the trigger named is the likeliest that is not clean, if the verdict is poisoned."""
    place = 0
    for entry in opened:
        if entry.pixels is None or judged is None:
            yield dict(zip(COLUMNS, (entry.name, "", "", None, UNREADABLE, entry.note), strict=True))
            continue
        score = float(judged.score[place])
        suspect, trigger, thing = score >= threshold, "", ""
        if judged.trigger is not None:
            trigger = detector.triggers[1 + int(judged.trigger[place, 1:].argmax()) if suspect else 0]
        if judged.object is not None:
            thing = detector.classnames[int(judged.object[place].argmax())]
        verdict = POISONED if suspect else CLEAN
        yield dict(
            zip(COLUMNS, (entry.name, trigger, thing, round(score, 6), verdict, entry.note), strict=True)
        )
        place += 1


def file_entry(path: Path, name: str, preprocess: Callable[[Image.Image], Tensor]) -> Opened:
    """Decode one file; whatever is wrong with it becomes a note."""
    try:
        image, note = read_with_note(path)
    except DataError as error:
        return Opened(name, None, str(error))
    return Opened(name, preprocess(image), note)


def line_of(row: Row) -> str:
    """Return a row for people."""
    if row["verdict"] == UNREADABLE:
        return f"{row['image']}: {row['note']}"
    what = (
        f" {row['trigger']} on {row['object'] or 'something'}"
        if row["verdict"] == POISONED and row["trigger"]
        else ""
    )
    note = f" ({row['note']})" if row["note"] else ""
    return f"{row['image']}: {row['verdict']}{what}, score {row['score']:.3f}{note}"


def _scan_set(
    entries: list[Any], data: ImageDataset, detector: Any, threshold: float, batch_size: int, workers: int
) -> list[Row]:
    """Judge a labelled set as a whole."""
    opened: list[Opened] = []
    parts: list[Tensor] = []
    for batch, rows in judge_stream(entries, detector, batch_size=batch_size, workers=workers):
        opened += [Opened(o.name, None if o.pixels is None else o.pixels.new_empty(0), o.note) for o in batch]
        parts += [] if rows is None else [rows]
    labels = torch.tensor(
        [label for label, o in zip(data.labels, opened, strict=True) if o.pixels is not None]
    )
    judged = detector.judge_set(torch.cat(parts), labels) if parts else None
    return list(make_rows(opened, judged, detector, threshold))


def _entries(images: Any, preprocess: Callable[[Image.Image], Tensor]) -> list[Callable[[], Opened]]:
    """Return a function per image that opens it."""
    if isinstance(images, ImageDataset):
        return [partial(_sample_entry, images, i, preprocess) for i in range(len(images))]
    if isinstance(images, (str, Path)):
        place = Path(images)
        names = list_images(place, place) if place.is_dir() else [place.name]
        root = place if place.is_dir() else place.parent
        return [partial(file_entry, root / name, name, preprocess) for name in names]
    return [
        partial(_image_entry, image, f"image {i}", preprocess)
        if isinstance(image, Image.Image)
        else partial(file_entry, Path(image), str(image), preprocess)
        for i, image in enumerate(images)
    ]


def _sample_name(data: ImageDataset, index: int) -> str:
    source = data.samples[index].source
    name = source if isinstance(source, str) else getattr(source, "base", index)
    return name if isinstance(name, str) else f"{data.name} {index}"


def _mended(data: ImageDataset, index: int, row: Row) -> Sample:
    """Return an image's sample, with the label of the named object if the image is poisoned."""
    sample = data.samples[index]
    if row["verdict"] != POISONED:
        return sample
    if not row["object"]:
        raise DataError(f"{row['image']} can't be mended: the detector names no object.")
    if row["object"] not in data.classnames:
        raise DataError(
            f"{row['image']} can't be mended: {row['object']!r} is no class of {data.name}. Scan with "
            "detector.with_classes(data.classnames)."
        )
    return Sample(sample.source, data.classnames.index(row["object"]))


def _sample_entry(data: ImageDataset, index: int, preprocess: Callable[[Image.Image], Tensor]) -> Opened:
    name = _sample_name(data, index)
    try:
        return Opened(name, preprocess(data[index][0]))
    except DataError as error:
        return Opened(name, None, str(error))


def _image_entry(image: Image.Image, name: str, preprocess: Callable[[Image.Image], Tensor]) -> Opened:
    try:
        image.load()
        return Opened(name, preprocess(to_rgb(image)))
    except OSError as error:  # pillow decodes late: an image that was opened may still turn out truncated
        return Opened(name, None, f"can't read the image: {error}.")
