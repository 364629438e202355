"""Naming a user's own images."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vlprompt.core.errors import DataError
from vlprompt.core.paths import user_path
from vlprompt.data.images import EXTENSIONS, read_image, to_rgb
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
        """Return the table as CSV text, one line per (image, rank)."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["image", "rank", "label", "probability", "error"])

        for row in self.rows:
            if row["error"]:
                writer.writerow([row["image"], "", "", "", row["error"]])
            for rank, (label, prob) in enumerate(zip(row["labels"], row["probs"], strict=True), 1):
                writer.writerow([row["image"], rank, label, f"{prob:.6f}", ""])

        return out.getvalue()


def predict(
    learner: Learner,
    images: str | Path | Sequence[str | Path | Image.Image],
    topk: int = 5,
    *,
    batch_size: int = 64,
) -> PredictionTable:
    """Name images.

    Args:
        learner: See :func:`vlprompt.load`.
        images: A folder (searched recursively), one file, or a list of files or PIL images.
        topk: Names per image, at least 1; more than C gives C.
        batch_size: Images per pass.

    Returns:
        A table; an image that can't be read has its reason in ``error`` and stops nothing.

    Raises:
        DataError: If there is no image, or ``topk`` is below 1.
    """
    if topk < 1:
        raise DataError(f"topk must be at least 1, got {topk}.")

    sources = _sources(images)
    learner.eval()

    rows: list[dict[str, Any]] = []
    for start in range(0, len(sources), batch_size):
        rows += _predict_batch(learner, sources[start : start + batch_size], topk, start)
    return PredictionTable(rows)


def _sources(images: str | Path | Sequence[str | Path | Image.Image]) -> list[Path | Image.Image]:
    """Return files and images one by one; a folder is searched."""
    if isinstance(images, (str, Path)):
        path = user_path(images)
        if not path.is_dir():
            return [path]

        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
        if not files:
            raise DataError(f"{path} holds no images ({', '.join(sorted(EXTENSIONS))}).")
        return list(files)

    if not len(images):
        raise DataError("no images to predict.")
    return [image if isinstance(image, Image.Image) else user_path(image) for image in images]


@torch.no_grad()
def _predict_batch(
    learner: Learner, sources: Sequence[Path | Image.Image], topk: int, first: int
) -> list[dict[str, Any]]:
    """Return one row per source; ``first`` is the number of the first one among all."""
    pixels: dict[int, torch.Tensor] = {}
    errors: dict[int, str] = {}
    for i, source in enumerate(sources):
        try:
            pixels[i] = learner.backbone.preprocess(_open(source))
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
    for i, source in enumerate(sources):
        row = {
            "image": f"image {first + i}" if isinstance(source, Image.Image) else str(source),
            "labels": labels.get(i, []),
            "probs": probabilities.get(i, []),
            "error": errors.get(i, ""),
        }
        rows.append(row)
    return rows


def _open(source: Path | Image.Image) -> Image.Image:
    """Return an image, decoded.

    Raises:
        DataError: If it can't be read.
    """
    if not isinstance(source, Image.Image):
        return read_image(source)

    try:
        source.load()
        return to_rgb(source)
    except OSError as error:  # pillow decodes late: an image that was opened may still turn out truncated
        raise DataError(f"can't read the image: {error}.") from None


def _named(row: dict[str, Any]) -> str:
    return ", ".join(
        f"{label} {100 * prob:.1f} %" for label, prob in zip(row["labels"], row["probs"], strict=True)
    )
