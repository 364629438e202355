"""Naming a user's own images."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import torch
from PIL import Image
from torch import nn

from vlprompt.backbones import Backbone
from vlprompt.classification.evaluate import ImageReader
from vlprompt.classification.label_space import in_learner_space
from vlprompt.core.csv_text import csv_text
from vlprompt.core.errors import DataError
from vlprompt.core.names import match_classes
from vlprompt.core.options import as_whole, check_counts, check_type
from vlprompt.data import ImageDataset
from vlprompt.data.inputs import ImageInput, image_inputs
from vlprompt.data.loading import Loader, Workers, takes_workers
from vlprompt.learners import Learner

__all__ = [
    "Classifier",
    "PredictionTable",
    "Ranker",
    "accuracy",
    "check_classifier",
    "for_classes",
    "predict",
    "predict_batch",
    "untaught",
]

_log = logging.getLogger(__name__)

_NOT_FINITE = (
    "the logits are NaN or infinite. What was learned is damaged, or the precision (fp16) is too small for this "
    "backbone: train again, or use bf16 or fp32."
)


class Classifier(Protocol):
    """What names images: anything with these three attributes that can be called; see :func:`check_classifier`."""

    @property
    def classnames(self) -> Sequence[str]:
        """C names."""

    @property
    def device(self) -> torch.device:
        """Where it wants images."""

    @property
    def preprocess(self) -> Callable[[Image.Image], torch.Tensor]:
        """What makes (3, H, W) of an image of any size."""

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return (B, C) logits of (B, 3, H, W) preprocessed images."""


class Ranker(ABC):
    """What names images among so many classes that there is no row of logits."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where it wants images."""

    @property
    @abstractmethod
    def preprocess(self) -> Callable[[Image.Image], torch.Tensor]:
        """What makes (3, H, W) of an image of any size."""

    @abstractmethod
    def rank(self, images: torch.Tensor, topk: int) -> tuple[list[list[str]], list[list[float]]]:
        """Return the likeliest names of (B, 3, H, W) images and their probabilities, best first."""


@dataclass(frozen=True)
class PredictionTable:
    """Predictions, one row per image, in the order given.

    Attributes:
        rows: Dicts with ``image``, ``labels`` (best first), ``probs`` (same order, fractions) and ``error``,
            which is empty unless the image could not be read.
    """

    rows: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]

    def __str__(self) -> str:
        return "\n".join(f"{r['image']}: {r['error'] or _named(r)}" for r in self.rows)

    def to_csv(self) -> str:
        """Return the table as CSV text that is safe in spreadsheets, one line per (image, rank)."""
        return csv_text(("image", "rank", "label", "probability", "error"), self._lines())

    def _lines(self) -> Iterator[tuple[Any, ...]]:
        for row in self.rows:
            if row["error"]:
                yield row["image"], "", "", "", row["error"]
            for rank, (label, prob) in enumerate(zip(row["labels"], row["probs"], strict=True), 1):
                yield row["image"], rank, label, f"{prob:.6f}", ""


@takes_workers
def predict(
    classifier: Classifier | Ranker,
    images: Any,
    topk: int = 5,
    *,
    batch_size: int = 64,
    workers: Workers | None = None,
) -> PredictionTable:
    """Name images.

    Args:
        classifier: A learner, see :func:`vlprompt.load`, or a file that was exported
            (:class:`vlprompt.saved.exported.ExportedClassifier`), or a list of very many names
            (:class:`vlprompt.classification.name_list.NameList`), or a module of your own that is a
            :class:`Classifier`. Modules are switched to evaluation.
        images: One image or many, in any form that :func:`vlprompt.data.inputs.image_inputs` takes: a folder, a file, a
            PIL image, bytes, an open file, pixels, or an iterable of these, which is read a batch at a time. Addresses
            are refused.
        topk: Names per image, at least 1; more than C gives C.
        batch_size: Images per pass.
        workers: Processes that decode; see :data:`vlprompt.data.loading.Workers`.

    Returns:
        A table; an image that can't be read, or whose logits are NaN, has its reason in ``error`` and stops nothing.

    Raises:
        DataError: If there is no image, something is none, ``topk`` is below 1, or the classifier is none; says what
            it lacks.
    """
    check_classifier(classifier)
    check_counts(topk=topk, batch_size=batch_size)
    topk, batch_size = as_whole(topk), as_whole(batch_size)

    if isinstance(classifier, nn.Module):
        classifier.eval()
    if isinstance(classifier, Learner) and (warning := untaught(classifier.backbone, classifier.classnames)):
        _log.warning("%s", warning)
    inputs = image_inputs(images)
    rows: list[dict[str, Any]] = []
    batches = iter(lambda: [_sendable(image) for image in islice(inputs, batch_size)], [])
    with Loader(_InputReader(classifier.preprocess), pin=classifier.device.type == "cuda") as loader:
        for names, pixels, errors in loader.stream(batches):
            rows += predict_batch(classifier, names, pixels, errors, topk)
    return PredictionTable(rows)


def check_classifier(value: object) -> None:
    """Refuse what is neither a :class:`Classifier` nor a :class:`Ranker`.

    Attributes are asked for one by one, as they are read later: a submodule or what ``__getattr__`` answers counts.

    Raises:
        DataError: Says what was given, and what it lacks.
    """
    if isinstance(value, Ranker):
        return

    wanted = {
        "classnames": ("a sequence of names", _are_names),
        "device": ("a torch.device", lambda device: isinstance(device, torch.device)),
        "preprocess": ("a function of a PIL image", callable),
    }
    lacks = [
        f"{name} ({kind})" for name, (kind, fits) in wanted.items() if not fits(getattr(value, name, None))
    ]
    if not callable(value):
        lacks.append("__call__ (logits of images)")
    if lacks:
        made_by = "vlprompt.create_learner(...) or vlprompt.load(...)"
        check_type(value, (), "a classifier", made_by, f"It lacks {', '.join(lacks)}.")


def _are_names(value: object) -> bool:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        return False
    return all(isinstance(name, str) for name in value)


def for_classes(learner: Learner, names: Sequence[str]) -> Learner:
    """Return a learner that chooses from names: the same one if they are its own, whatever their order and capitals.

    Raises:
        DataError: If what was learned belongs to other classes, or names are impossible.
    """
    positions = match_classes(names, learner.classnames)
    known = sorted(position for position in positions if position is not None)
    is_own = len(known) == len(positions) and known == list(range(len(learner.classnames)))
    return learner if is_own else learner.with_classes(names)


def untaught(backbone: Backbone, texts: Sequence[str]) -> str:
    """Return a sentence that warns of words which mean nothing to a text tower; empty if there are none.

    Args:
        backbone: Whose tower it is; most know of no such word.
        texts: Class names or phrases.
    """
    words = backbone.unplaced_words(texts)
    if not words:
        return ""
    listed = ", ".join(map(repr, words))
    return f"{backbone.name} was taught no word like {listed}: what the text alone says of them means little."


@torch.no_grad()
def accuracy(classifier: Classifier, data: ImageDataset, *, batch_size: int = 64) -> float:
    """Return the share of images that are named right, a fraction in [0, 1]; :func:`vlprompt.evaluate` has more.

    Args:
        classifier: A learner, or a file that was exported.
        data: It must know all its classes.
        batch_size: Images per pass.

    Raises:
        DataError: If it doesn't know a class, or is no classifier.
    """
    check_classifier(classifier)
    check_counts(batch_size=batch_size)
    if isinstance(classifier, nn.Module):
        classifier.eval()
    data = in_learner_space(classifier, data)

    predicted = [
        classifier(pixels.to(classifier.device)).argmax(-1).cpu()
        for pixels in ImageReader(data, classifier.preprocess).batches(batch_size)
    ]
    return int((torch.cat(predicted) == torch.tensor(data.labels)).sum()) / len(data)


@dataclass(frozen=True)
class _InputReader:
    """Reads a batch of a user's images."""

    preprocess: Callable[[Image.Image], torch.Tensor]

    def __call__(
        self, inputs: Sequence[ImageInput | _Unreadable]
    ) -> tuple[list[str], dict[int, torch.Tensor], dict[int, str]]:
        """Return names, and by the number in the batch pixels (3, H, W) or the reason why there are none."""
        pixels: dict[int, torch.Tensor] = {}
        errors: dict[int, str] = {}
        for i, image in enumerate(inputs):
            if isinstance(image, _Unreadable):
                errors[i] = image.reason
                continue
            try:
                pixels[i] = self.preprocess(image.open())
            except DataError as error:
                errors[i] = str(error)
        return [image.name for image in inputs], pixels, errors


@dataclass(frozen=True)
class _Unreadable:
    """An image that could not be read."""

    name: str
    reason: str


def _sendable(image: ImageInput) -> ImageInput | _Unreadable:
    """Return an image that another process can take: Pillow's images may be files that are not read yet."""
    if not isinstance(image.source, Image.Image):
        return image
    try:
        return ImageInput(image.name, image.open())
    except DataError as error:
        return _Unreadable(image.name, str(error))


@torch.no_grad()
def predict_batch(
    classifier: Classifier | Ranker,
    names: Sequence[str],
    pixels: Mapping[int, torch.Tensor],
    errors: Mapping[int, str],
    topk: int,
) -> list[dict[str, Any]]:
    """Return one row per image (see :class:`PredictionTable`).

    Args:
        classifier: Names them.
        names: Of n images.
        pixels: Number in the batch to (3, H, W), of those that can be read.
        errors: Number to the reason, of those that can't.
        topk: Names per image.
    """
    labels: dict[int, list[str]] = {}
    probabilities: dict[int, list[float]] = {}
    if pixels:
        batch = torch.stack(list(pixels.values())).to(classifier.device)
        ranked = (
            classifier.rank(batch, topk) if isinstance(classifier, Ranker) else _rank(classifier, batch, topk)
        )
        labels = dict(zip(pixels, ranked[0], strict=True))
        probabilities = dict(zip(pixels, ranked[1], strict=True))

    # A name that is chosen among NaN means nothing, so it is not said.
    undecided = [i for i, values in probabilities.items() if not all(map(math.isfinite, values))]
    for i in undecided:
        del labels[i], probabilities[i]
    errors = {**errors, **dict.fromkeys(undecided, _NOT_FINITE)}

    rows = []
    for i, name in enumerate(names):
        row = {
            "image": name,
            "labels": labels.get(i, []),
            "probs": probabilities.get(i, []),
            "error": errors.get(i, ""),
        }
        rows.append(row)
    return rows


def _rank(
    classifier: Classifier, images: torch.Tensor, topk: int
) -> tuple[list[list[str]], list[list[float]]]:
    """Return what :meth:`Ranker.rank` does, from logits of all classes."""
    names = classifier.classnames
    best = classifier(images).softmax(-1).topk(min(topk, len(names)), dim=-1)
    return [[names[number] for number in classes] for classes in best.indices.tolist()], best.values.tolist()


def _named(row: dict[str, Any]) -> str:
    return ", ".join(
        f"{label} {100 * prob:.1f} %" for label, prob in zip(row["labels"], row["probs"], strict=True)
    )
