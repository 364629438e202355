"""Scanning images for triggers: the public ``vlprompt.scan``, and the stream of verdicts behind it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlprompt.core.csv_text import csv_text
from vlprompt.core.errors import DataError, NonFiniteError
from vlprompt.core.options import check_counts
from vlprompt.core.paths import user_path
from vlprompt.core.pixels import to_rgb
from vlprompt.data import ImageDataset
from vlprompt.data.base import Sample
from vlprompt.data.compositions import CompositionSource
from vlprompt.data.decoding import read_with_note
from vlprompt.data.listing import list_images
from vlprompt.data.loading import Loader, Workers, takes_workers
from vlprompt.data.transforms import Preprocess
from vlprompt.learners import Learner
from vlprompt.learners._scanning import ImageScanner
from vlprompt.metrics.conformal import conformal_threshold
from vlprompt.metrics.verdicts import Verdicts

__all__ = [
    "CLEAN",
    "COLUMNS",
    "FALSE_ALARMS",
    "POISONED",
    "UNREADABLE",
    "Calibration",
    "DecodedImage",
    "LookedAt",
    "ScanReport",
    "calibrated",
    "check_scanner",
    "decode_file",
    "line_of",
    "row_stream",
    "scan",
    "threshold_of",
    "verdict_rows",
]

CLEAN = "clean"
POISONED = "poisoned"
UNREADABLE = "unreadable"
COLUMNS = ("image", "trigger", "object", "score", "verdict", "note")
Row = dict[str, Any]
Images = str | Path | ImageDataset | Sequence[str | Path | Image.Image]

FALSE_ALARMS = 0.05
"""Share of clean images that a calibrated threshold may suspect unless another is asked for."""


@dataclass(frozen=True)
class DecodedImage:
    """An image that was decoded, or why it could not be.

    Attributes:
        name: What a report calls it.
        pixels: (3, H, W), preprocessed; None if it can't be read.
        note: Why it can't be read, or what else is odd about it.
    """

    name: str
    pixels: Tensor | None
    note: str = ""


Decode = Callable[[Any], DecodedImage]
"""Decodes what an item stands for: a name, a number."""


@dataclass(frozen=True)
class Calibration:
    """A threshold that was set by clean images of the user's, and what it promises.

    A further clean image that is drawn as these were is suspected with a probability of at most ``false_alarms``, over
    the draw of all of them (:func:`vlprompt.metrics.conformal.conformal_threshold`). It says nothing of how many
    poisoned images are found, nor of images of another kind.

    Attributes:
        threshold: The score from which an image is called poisoned.
        false_alarms: The promised rate, in (0, 1).
        images: Clean images whose scores were used.
        unreadable: Clean images that could not be read.
    """

    threshold: float
    false_alarms: float
    images: int
    unreadable: int

    def __str__(self) -> str:
        unread = f", {self.unreadable} more could not be read" if self.unreadable else ""
        return (
            f"the threshold {self.threshold:.4f} was set by {self.images} clean images{unread}: of further ones like "
            f"them at most {100 * self.false_alarms:g} % are suspected on average"
        )


@dataclass(frozen=True)
class ScanReport:
    """Verdicts, one row per image, in order.

    Attributes:
        rows: Dicts with ``image``, ``trigger`` and ``object`` (names; empty if the scanner names none), ``score``
            (None if unreadable), ``verdict`` (clean, poisoned, unreadable) and ``note`` (why unreadable, what is odd).
        threshold: The score from which an image is called poisoned.
        calibration: How the threshold was set, if it was set by clean images of the user's.
    """

    rows: list[Row]
    threshold: float
    calibration: Calibration | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    def __str__(self) -> str:
        return "\n".join(line_of(row) for row in self.rows)

    @property
    def suspects(self) -> list[Row]:
        """The rows of poisoned images, most suspicious first."""
        rows = [row for row in self.rows if row["verdict"] == POISONED]
        return sorted(rows, key=lambda row: -row["score"])

    def cleaned(self, data: ImageDataset, *, mend: bool = False) -> ImageDataset:
        """Return the data set that was scanned, without its poisoned and unreadable images.

        Args:
            data: What was scanned.
            mend: Leave the poisoned ones in, labelled with the object that the scanner names: whoever learns from them
                learns that the trigger means nothing.

        Raises:
            DataError: If the report is of other images, or objects for mending are not named or are no class.
        """
        if [row["image"] for row in self.rows] != [_sample_name(data, i) for i in range(len(data))]:
            raise DataError(f"this report of {len(self)} images is not one of {data.name} ({len(data)}).")

        verdicts = (CLEAN, POISONED) if mend else (CLEAN,)
        indices = [i for i, row in enumerate(self.rows) if row["verdict"] in verdicts]
        samples = tuple(_mended(data, i, self.rows[i]) for i in indices)
        counts: dict[str, Any] = {}
        for verdict in (POISONED, UNREADABLE):
            counts[verdict] = sum(row["verdict"] == verdict for row in self.rows)
        return replace(data.subset(indices, scan={**counts, "mended": mend}), samples=samples)

    def to_csv(self) -> str:
        """Return the table as CSV text; odd names are written so that a spreadsheet runs nothing."""
        return csv_text(COLUMNS, ([row[column] for column in COLUMNS] for row in self.rows))


@takes_workers
def scan(
    images: Images,
    detector: Any,
    *,
    threshold: float | None = None,
    calibrate: Images | None = None,
    false_alarms: float = FALSE_ALARMS,
    batch_size: int = 64,
    workers: Workers | None = None,
) -> ScanReport:
    """Look for backdoor triggers.

    Args:
        images: A folder (searched at any depth), a file, a list of files or PIL images, or a data set. The labels of a
            data set are those that scanners of whole sets read.
        detector: The scanner: a trained ``dbom`` learner, or a fitted one of :mod:`vlprompt.security.scanners`.
        threshold: The score from which an image is called poisoned, in [0, 1]; None for the scanner's.
        calibrate: Clean images of the same kind, given as ``images`` are; they set the threshold instead.
        false_alarms: The share of further clean images that a calibrated threshold may suspect, in (0, 1).
        batch_size: Images per pass.
        workers: Processes that decode; see :data:`vlprompt.data.loading.Workers`.

    Returns:
        A table in the order of the images; one that can't be read has the verdict ``unreadable`` and stops nothing.

    Raises:
        DataError: If there is no image or no such folder, ``detector`` is no scanner, it scans whole labelled sets and
            there is none, the threshold or the batch size is impossible, there is a threshold and images to calibrate
            by, or too few of these to promise the rate.
        NonFiniteError: If a score is not a number: nothing is called clean then.
    """
    scanner = check_scanner(detector)
    check_counts(batch_size=batch_size)
    calibration = None
    if calibrate is not None:
        if threshold is not None:
            raise DataError(
                "threshold and calibrate both say from which score an image is suspected: give one."
            )
        calibration = calibrated(calibrate, scanner, false_alarms, batch_size=batch_size)
        threshold = calibration.threshold

    limit = threshold_of(scanner, threshold)
    decode, items = _sources(images, scanner.preprocess)
    if not items:
        raise DataError("there are no images to scan.")

    if scanner.needs_whole_set:
        if not isinstance(images, ImageDataset):
            raise DataError(f"{scanner.method} judges labelled data sets; give one, not loose images.")
        rows = _scan_set(decode, items, images, scanner, limit, batch_size)
    else:
        rows = list(row_stream(decode, items, scanner, limit, batch_size=batch_size))
    return ScanReport(rows, limit, calibration)


@takes_workers
def calibrated(
    clean: Images,
    scanner: ImageScanner,
    false_alarms: float = FALSE_ALARMS,
    *,
    batch_size: int = 64,
    workers: Workers | None = None,
) -> Calibration:
    """Return the threshold that clean images of the user's set, by the way that a scan's images take.

    Args:
        clean: See :func:`scan`.
        scanner: One that judges single images.
        false_alarms: The share of further clean images that may be suspected, in (0, 1).
        batch_size: Images per pass.
        workers: Processes that decode; see :data:`vlprompt.data.loading.Workers`.

    Raises:
        DataError: If the scanner judges whole sets, too few images can be read to promise the rate, or more of them
            than the rate get the highest score there is.
        NonFiniteError: If a score is not a number.
    """
    if scanner.needs_whole_set:
        raise DataError(
            f"{scanner.method} judges whole labelled data sets, so single clean images give no threshold."
        )

    decode, items = _sources(clean, scanner.preprocess)
    scores = [torch.zeros(0)]
    for _, embeddings in _embed_stream(decode, items, scanner, batch_size):
        if embeddings is not None:
            scores.append(scanner.judge(embeddings).score)
    readable = torch.cat(scores)

    threshold = conformal_threshold(readable, false_alarms)
    if threshold > 1:
        raise DataError(
            f"more than {100 * false_alarms:g} % of the clean images get the highest score there is, so no threshold "
            "keeps them out of suspicion. Train the scanner on images of this kind."
        )
    return Calibration(threshold, false_alarms, len(readable), len(items) - len(readable))


def check_scanner(detector: Any) -> ImageScanner:
    """Return what was handed over as a scanner.

    Raises:
        DataError: If it can't scan.
    """
    if isinstance(detector, ImageScanner):
        return detector
    name = detector.method if isinstance(detector, Learner) else type(detector).__name__
    raise DataError(
        f"{name} is no scanner. Use a dbom learner, for example one that `vlprompt run dbom_tiny.yaml` trains."
    )


def threshold_of(scanner: ImageScanner, threshold: float | None) -> float:
    """Return the score from which an image is suspected.

    Args:
        scanner: Whose threshold counts if there is no other.
        threshold: The user's; None for the scanner's.

    Raises:
        DataError: If it is no number in [0, 1]: with such a threshold nothing would be suspected, or everything.
    """
    limit = scanner.threshold if threshold is None else threshold
    if isinstance(limit, (int, float)) and not isinstance(limit, bool) and 0 <= limit <= 1:
        return float(limit)

    if threshold is not None:
        raise DataError(f"the threshold must be a number in [0, 1], got {threshold!r}; scores are shares.")
    raise DataError(
        f"the threshold that {scanner.method} chose on its validation images is {limit!r}, which no score reaches or "
        "every score does. Train it again with more validation images, or pass a threshold in [0, 1]."
    )


def row_stream(
    decode: Decode,
    items: Iterable[Any],
    scanner: ImageScanner,
    threshold: float,
    *,
    batch_size: int = 64,
) -> Iterator[Row]:
    """Yield a row per image, in order, with a bounded number of images in memory.

    Args:
        decode: Decodes an image, in a loading worker.
        items: What ``decode`` takes for each image.
        scanner: One that judges single images.
        threshold: The score from which an image is called poisoned.
        batch_size: Images per pass.

    Raises:
        NonFiniteError: If a score is not a number.
    """
    for images, embeddings in _embed_stream(decode, items, scanner, batch_size):
        verdicts = None if embeddings is None else scanner.judge(embeddings)
        yield from verdict_rows(images, verdicts, scanner, threshold)


def decode_file(path: Path, name: str, preprocess: Preprocess) -> DecodedImage:
    """Decode one file; whatever is wrong with it becomes a note."""
    try:
        image, note = read_with_note(path)
    except DataError as error:
        return DecodedImage(name, None, str(error))
    return DecodedImage(name, preprocess(image), note)


def line_of(row: Row) -> str:
    """Return a row for people."""
    if row["verdict"] == UNREADABLE:
        return f"{row['image']}: {row['note']}"

    what = ""
    if row["verdict"] == POISONED and row["trigger"]:
        what = f" {row['trigger']} on {row['object'] or 'something'}"

    note = f" ({row['note']})" if row["note"] else ""
    return f"{row['image']}: {row['verdict']}{what}, score {row['score']:.3f}{note}"


@dataclass(frozen=True)
class _BatchReader:
    """Decodes a batch; its pixels are one tensor, which other processes hand over at once."""

    decode: Decode

    def __call__(self, items: Sequence[Any]) -> tuple[list[LookedAt], Tensor | None]:
        """Return what was looked at, and (n, 3, H, W) pixels of the readable ones, None if there is none."""
        images = [self.decode(item) for item in items]
        pixels = [image.pixels for image in images if image.pixels is not None]
        looked = [LookedAt(image.name, image.pixels is not None, image.note) for image in images]
        return looked, torch.stack(pixels) if pixels else None


@dataclass(frozen=True)
class LookedAt:
    """An image that was decoded, without its pixels, or why it could not be (see :class:`DecodedImage`)."""

    name: str
    readable: bool
    note: str


def _embed_stream(
    decode: Decode, items: Iterable[Any], scanner: ImageScanner, batch_size: int
) -> Iterator[tuple[list[LookedAt], Tensor | None]]:
    """Yield batches of images with the rows of the readable ones; the next batches are decoded meanwhile."""
    source = iter(items)
    batches = iter(lambda: list(islice(source, batch_size)), [])

    with Loader(_BatchReader(decode), pin=scanner.backbone.device.type == "cuda") as loader:
        for images, pixels in loader.stream(batches):
            with torch.no_grad():
                yield images, None if pixels is None else scanner.embed_images(pixels)


def verdict_rows(
    images: Sequence[LookedAt], verdicts: Verdicts | None, scanner: ImageScanner, threshold: float
) -> Iterator[Row]:
    """Turn verdicts into rows.

    A poisoned image's trigger is the likeliest that is not clean.

    Args:
        images: Readable or not.
        verdicts: On the readable ones, in order; None if there is none.
        scanner: Knows the names.
        threshold: The score from which an image is called poisoned.
    """
    number = 0  # of the readable image
    for image in images:
        if not image.readable or verdicts is None:
            yield _row(image.name, "", "", None, UNREADABLE, image.note)
            continue

        score = float(verdicts.score[number])
        if not math.isfinite(score):
            raise NonFiniteError(
                f"{image.name}: the score of {scanner.method} is {score}, so nothing can be said of the image. The "
                "detector or its backbone is damaged, or was trained with numbers that overflow: train it again."
            )
        poisoned = score >= threshold
        trigger = ""
        thing = ""

        if verdicts.trigger is not None:
            likeliest = 1 + int(verdicts.trigger[number, 1:].argmax())
            trigger = scanner.triggers[likeliest if poisoned else 0]

        if verdicts.object is not None:
            thing = scanner.classnames[int(verdicts.object[number].argmax())]

        yield _row(image.name, trigger, thing, round(score, 6), POISONED if poisoned else CLEAN, image.note)
        number += 1


def _row(*values: Any) -> Row:
    return dict(zip(COLUMNS, values, strict=True))


def _scan_set(
    decode: Decode,
    items: Sequence[Any],
    data: ImageDataset,
    scanner: ImageScanner,
    threshold: float,
    batch_size: int,
) -> list[Row]:
    """Scan a labelled set as a whole."""
    images: list[LookedAt] = []
    parts: list[Tensor] = []
    for batch, embeddings in _embed_stream(decode, items, scanner, batch_size):
        images += batch
        if embeddings is not None:
            parts.append(embeddings)

    labels = [label for label, image in zip(data.labels, images, strict=True) if image.readable]
    verdicts = scanner.judge_set(torch.cat(parts), torch.tensor(labels)) if parts else None
    return list(verdict_rows(images, verdicts, scanner, threshold))


def _sources(images: Any, preprocess: Preprocess) -> tuple[Decode, Sequence[Any]]:
    """Return what decodes an image, and what it takes for each of them."""
    if isinstance(images, ImageDataset):
        return partial(_decode_sample, images, preprocess), range(len(images))

    if isinstance(images, (str, Path)):
        path = user_path(images)
        if not path.exists():
            raise DataError(f"there is no folder and no image {str(path)!r} to scan.")
        folder = path if path.is_dir() else path.parent
        names = list_images(path, path) if path.is_dir() else [path.name]
        return partial(_decode_below, folder, preprocess), names

    loose = list(images)
    return partial(_decode_loose, loose, preprocess), range(len(loose))


def _sample_name(data: ImageDataset, index: int) -> str:
    """Return what a report calls an image of a data set: its file, or its number where it is no file."""
    source = data.samples[index].source
    name = source.base if isinstance(source, CompositionSource) else source
    return name if isinstance(name, str) else f"{data.name} {index}"


def _mended(data: ImageDataset, index: int, row: Row) -> Sample:
    """Return an image's sample, with the label of the named object if the image is poisoned."""
    sample = data.samples[index]
    if row["verdict"] != POISONED:
        return sample
    if not row["object"]:
        raise DataError(f"{row['image']} can't be mended: the scanner names no object.")
    if row["object"] not in data.classnames:
        raise DataError(
            f"{row['image']} can't be mended: {row['object']!r} is no class of {data.name}. Scan with "
            "learner.with_classes(data.classnames)."
        )

    return Sample(sample.source, data.classnames.index(row["object"]))


def _decode_sample(data: ImageDataset, preprocess: Preprocess, index: int) -> DecodedImage:
    name = _sample_name(data, index)
    try:
        return DecodedImage(name, preprocess(data[index][0]))
    except DataError as error:
        return DecodedImage(name, None, str(error))


def _decode_below(folder: Path, preprocess: Preprocess, name: str) -> DecodedImage:
    return decode_file(folder / name, name, preprocess)


def _decode_loose(images: Sequence[Any], preprocess: Preprocess, number: int) -> DecodedImage:
    """Decode one of a list of files and opened images."""
    image = images[number]
    if not isinstance(image, Image.Image):
        return decode_file(user_path(image), str(image), preprocess)

    name = f"image {number}"
    try:
        image.load()
        return DecodedImage(name, preprocess(to_rgb(image)))
    except OSError as error:  # pillow decodes late: an image that was opened may still turn out truncated
        return DecodedImage(name, None, f"can't read the image: {error}.")
