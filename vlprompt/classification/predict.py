"""Naming a user's own images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from vlprompt.core.csv_text import csv_text
from vlprompt.core.errors import DataError
from vlprompt.data.inputs import ImageInput, image_inputs
from vlprompt.learners import Learner

__all__ = ["PredictionTable", "predict"]


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


def predict(learner: Learner, images: Any, topk: int = 5, *, batch_size: int = 64) -> PredictionTable:
    """Name images.

    Args:
        learner: See :func:`vlprompt.load`.
        images: One image or many, in any form that :func:`vlprompt.data.inputs.image_inputs` takes: a folder, a file, a
            PIL image, bytes, an open file, pixels, or an iterable of these, which is read a batch at a time. Addresses
            are refused.
        topk: Names per image, at least 1; more than C gives C.
        batch_size: Images per pass.

    Returns:
        A table; an image that can't be read has its reason in ``error`` and stops nothing.

    Raises:
        DataError: If there is no image, something is none, or ``topk`` is below 1.
    """
    for name, value in (("topk", topk), ("batch_size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise DataError(f"{name} must be at least 1, got {value}.")

    learner.eval()
    inputs = image_inputs(images)
    rows: list[dict[str, Any]] = []
    while batch := list(islice(inputs, batch_size)):
        rows += _predict_batch(learner, batch, topk)
    return PredictionTable(rows)


@torch.no_grad()
def _predict_batch(learner: Learner, inputs: Sequence[ImageInput], topk: int) -> list[dict[str, Any]]:
    """Return one row per image."""
    pixels: dict[int, torch.Tensor] = {}
    errors: dict[int, str] = {}
    for i, image in enumerate(inputs):
        try:
            pixels[i] = learner.preprocess(image.open())
        except DataError as error:
            errors[i] = str(error)

    labels: dict[int, list[str]] = {}
    probabilities: dict[int, list[float]] = {}
    if pixels:
        logits = learner(torch.stack(list(pixels.values())).to(learner.backbone.device))
        best = logits.softmax(-1).topk(min(topk, len(learner.classnames)), dim=-1)
        for i, values, classes in zip(pixels, best.values.tolist(), best.indices.tolist(), strict=True):
            labels[i] = [learner.classnames[number] for number in classes]
            probabilities[i] = values

    rows = []
    for i, image in enumerate(inputs):
        row = {
            "image": image.name,
            "labels": labels.get(i, []),
            "probs": probabilities.get(i, []),
            "error": errors.get(i, ""),
        }
        rows.append(row)
    return rows


def _named(row: dict[str, Any]) -> str:
    return ", ".join(
        f"{label} {100 * prob:.1f} %" for label, prob in zip(row["labels"], row["probs"], strict=True)
    )
