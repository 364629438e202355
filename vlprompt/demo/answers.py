"""What the page answers: a card for each image. Nothing here knows of Gradio."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vlprompt.adaptation import create_adapter
from vlprompt.classification.predict import for_classes, predict, untaught
from vlprompt.core.errors import DataError
from vlprompt.core.names import printable
from vlprompt.data.decoding import Decoding, read_image
from vlprompt.data.thumbnails import data_uri
from vlprompt.demo.limits import MAX_PIXELS, Limits, check_text_length
from vlprompt.learners import Learner
from vlprompt.learners._scanning import ImageScanner
from vlprompt.security.folder import scan_folder
from vlprompt.security.scan import POISONED
from vlprompt.segmentation import Segmenter
from vlprompt.segmentation.evaluate import predict_mask
from vlprompt.segmentation.overlays import overlay

__all__ = [
    "Answer",
    "Bars",
    "Card",
    "adapt_to_images",
    "find_phrase",
    "name_images",
    "scan_for_triggers",
    "typed_names",
]

_MASKED = 768  # longest side of an image with its mask, pixels
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Bars:
    """Names and their shares, best first.

    Attributes:
        rows: (name, fraction in [0, 1]).
        heading: Above them.
    """

    rows: tuple[tuple[str, float], ...]
    heading: str = ""


@dataclass(frozen=True)
class Card:
    """One image and what is said of it.

    Attributes:
        title: Name of its file.
        picture: A data URI; empty if it can't be shown.
        is_sharp: Whether its pixels stay sharp when it is enlarged.
        bars: Side by side.
        text: Below them.
        error: Why nothing is said.
        is_suspected: Whether it stands out.
    """

    title: str
    picture: str = ""
    is_sharp: bool = False
    bars: tuple[Bars, ...] = ()
    text: str = ""
    error: str = ""
    is_suspected: bool = False


@dataclass(frozen=True)
class Answer:
    """What one tab of the page shows.

    Attributes:
        summary: One sentence.
        cards: One for each image.
        warning: What makes the answer mean less.
        is_large: Whether the pictures are what is to be looked at.
    """

    summary: str
    cards: tuple[Card, ...] = ()
    warning: str = ""
    is_large: bool = False


@dataclass(frozen=True)
class _Opened:
    """An uploaded image, or why it can't be read."""

    title: str
    image: Image.Image | None
    error: str = ""

    def card(self, picture: Image.Image | None = None, **facts: Any) -> Card:
        """Return its card.

        Args:
            picture: Shown in its place.
            **facts: See :class:`Card`.
        """
        if self.image is None:
            return Card(self.title, error=self.error)
        uri, is_sharp = data_uri(self.image) if picture is None else data_uri(picture, _MASKED)
        return Card(self.title, uri, is_sharp, **facts)


def typed_names(text: str) -> list[str]:
    """Return class names from a text with one a line.

    Raises:
        DataError: If it is too long.
    """
    lines = check_text_length(text, "The class names").splitlines()
    return [line.strip() for line in lines if line.strip()]


def name_images(learner: Learner, paths: Sequence[str], names: str, topk: int, limits: Limits) -> Answer:
    """Name every image.

    Args:
        learner: A classifier.
        paths: The uploaded files.
        names: Class names, one a line.
        topk: Names per image.
        limits: Of the page.

    Raises:
        DataError: For too many images or impossible names.
    """
    limits.check_count(len(paths))
    classifier = for_classes(learner, typed_names(names))

    opened = [_open(path) for path in paths]
    readable = [one.image for one in opened if one.image is not None]
    rows = iter(predict(classifier, readable, topk, workers=0) if readable else ())
    cards = []
    for one in opened:
        row = next(rows) if one.image is not None else {"labels": (), "probs": ()}
        cards.append(one.card(bars=(Bars(tuple(zip(row["labels"], row["probs"], strict=True))),)))

    summary = f"{_counted(readable)} named by {learner.title()} on {learner.backbone.name}."
    return Answer(summary, tuple(cards), untaught(classifier.backbone, classifier.classnames))


def adapt_to_images(
    learner: Learner, paths: Sequence[str], names: str, adapter: str, topk: int, limits: Limits
) -> Answer:
    """Name every image without and with adaptation, side by side.

    Args:
        learner: Where adaptation starts; it is not changed.
        paths: The uploaded files, in the order of the stream.
        names: Class names, one a line.
        adapter: Its registry name. It begins anew with every call.
        topk: Names per image and side.
        limits: Of the page.

    Raises:
        DataError: For too many images, impossible names, or a learner that the method can't adapt.
        BackboneError: If the method can't work on the backbone.
    """
    limits.check_count(len(paths))
    start = for_classes(learner, typed_names(names))
    if start.method == "zero_shot":  # has no prompts to tune; from a bare backbone a method brings its own
        method = create_adapter(adapter, start.backbone, start.classnames, start.templates)
    else:
        method = create_adapter(adapter, start)

    opened = [_open(path) for path in paths]
    readable = [one.image for one in opened if one.image is not None]
    predictions = method.predict(readable) if readable else None
    cards = []
    changed = 0
    number = 0
    for one in opened:
        if one.image is None or predictions is None:
            cards.append(one.card())
            continue
        sides = [
            Bars(_best(predictions.classnames, probs[number].tolist(), topk), heading)
            for heading, probs in (
                ("as it is", predictions.before),
                (f"with {adapter}", predictions.probs),
            )
        ]
        changed += sides[0].rows[0][0] != sides[1].rows[0][0]
        cards.append(one.card(bars=tuple(sides)))
        number += 1

    summary = f"{_counted(readable)}: {adapter} changes the first name of {changed}."
    return Answer(summary, tuple(cards), untaught(method.backbone, method.classnames))


def find_phrase(
    segmenter: Segmenter, paths: Sequence[str], phrase: str, threshold: float, limits: Limits
) -> Answer:
    """Lay the mask of a phrase over every image.

    Args:
        segmenter: The model.
        paths: The uploaded files.
        phrase: What to find.
        threshold: Probability above which a pixel is inside.
        limits: Of the page.

    Raises:
        DataError: For too many images or no phrase.
    """
    limits.check_count(len(paths))
    words = check_text_length(phrase, "The phrase")
    if not words:
        raise DataError("Type what to find, for example: a red circle.")

    cards = []
    opened = [_open(path) for path in paths]
    for one in opened:
        if one.image is None:
            cards.append(one.card())
            continue
        image = one.image.copy()
        image.thumbnail((_MASKED, _MASKED))
        inside = predict_mask(segmenter, image, words) > threshold
        share = f"{100 * inside.mean():.1f} % of the image"
        cards.append(one.card(overlay(image, inside), text=share))

    readable = [one for one in opened if one.image is not None]
    summary = (
        f"{_counted(readable)} searched for {words!r} by {segmenter.title()} on {segmenter.backbone.name}."
    )
    return Answer(summary, tuple(cards), untaught(segmenter.backbone, [words]), is_large=True)


def scan_for_triggers(
    scanner: ImageScanner | None, folder: str, top: int, limits: Limits, progress: Progress | None = None
) -> Answer:
    """Scan a folder for backdoor triggers; the most suspicious images come first.

    Links that leave the folder are not followed, and nothing is left behind.

    Args:
        scanner: None if the page has none.
        folder: As typed.
        top: Images to show.
        limits: Which folders may be read.
        progress: Called with ("scanned", done, total).

    Raises:
        DataError: If there is no scanner, the folder may not be read, or it holds no image.
    """
    if scanner is None:
        raise DataError(
            "The page has no scanner. Train one with vlprompt run dbom_tiny.yaml, and start the page with it: "
            "vlprompt demo runs/dbom_tiny/ID/cells/NAME --folder PATH."
        )
    root = limits.folder(check_text_length(folder, "The folder"))

    with tempfile.TemporaryDirectory() as target:
        outcome = scan_folder(root, scanner, target, workers=0, top=0, follow_links=False, progress=progress)
        rows = json.loads((Path(target) / "report.json").read_text(encoding="utf-8"))

    judged = [row for row in rows if row["score"] is not None]
    judged.sort(key=lambda row: -row["score"])
    unreadable = [row for row in rows if row["score"] is None]
    cards = [_scan_card(root, row) for row in judged[:top]]
    cards += [Card(printable(row["image"]), error=row["note"]) for row in unreadable[:top]]

    images = "1 image" if outcome.total == 1 else f"{outcome.total} images"
    found = f"{outcome.poisoned} suspected, {outcome.unreadable} unreadable"
    summary = f"{images}: {found}. The most suspicious come first."
    return Answer(summary, tuple(cards))


def _open(path: str) -> _Opened:
    title = printable(Path(path).name)
    try:
        return _Opened(title, read_image(path, Decoding(MAX_PIXELS)))
    except DataError as error:
        # The error names where the upload lies, which means nothing to whoever uploaded it.
        return _Opened(title, None, str(error).replace(path, title))


def _counted(images: Sequence[object]) -> str:
    return "1 image" if len(images) == 1 else f"{len(images)} images"


def _best(names: Sequence[str], probs: Sequence[float], topk: int) -> tuple[tuple[str, float], ...]:
    ranked = sorted(zip(names, probs, strict=True), key=lambda pair: -pair[1])
    return tuple(ranked[:topk])


def _scan_card(root: Path, row: dict[str, Any]) -> Card:
    """Return the card of one row of a scan."""
    is_suspected = row["verdict"] == POISONED
    verdict = "suspected" if is_suspected else "clean"
    if is_suspected and row["trigger"]:
        verdict += f": {row['trigger']}"
    shown = f"; shows {row['object']}" if row["object"] else ""
    note = f" ({row['note']})" if row["note"] else ""

    opened = _open(str(root / row["image"]))
    facts = {
        "bars": (Bars((("suspicion", row["score"]),)),),
        "text": f"{verdict}{shown}{note}",
        "is_suspected": is_suspected,
    }
    card = opened.card(**facts)
    return Card(**{**vars(card), "title": printable(row["image"])})
