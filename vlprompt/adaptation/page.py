"""What the report of test-time adaptation shows beside tables: headline figures, and predictions on images."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vlprompt.adaptation.config import AdaptationConfig
from vlprompt.adaptation.mixing import intruders_of
from vlprompt.adaptation.stream import read_predictions
from vlprompt.adaptation.summary import headline_data
from vlprompt.data import ImageDataset
from vlprompt.experiments.report import RunRecord

__all__ = ["add_predictions", "describe"]


def describe(record: RunRecord, config: AdaptationConfig) -> None:
    """Set the title, the summary and the figures that open the page."""
    record.title = f"Test-time adaptation on {', '.join(config.data.names)}"
    start = config.backbone.name if config.prompt is None else f"{config.backbone.name}, {config.prompt}"
    images = "all images" if config.data.test_images is None else f"{config.data.test_images} images each"
    seeds = len(config.protocol.seeds)
    plural = "s" if seeds > 1 else ""
    record.summary = f"{start}; {config.data.split}, {images}; {seeds} seed{plural}."

    data = headline_data(config)
    first = next(iter(config.methods))
    keys = {"without adaptation": f"{first}/{data}/before_accuracy"}
    for label in config.methods:
        keys[label] = f"{label}/{data}/accuracy"
    record.headline = {label: record.metrics[key] for label, key in keys.items() if key in record.metrics}


def add_predictions(record: RunRecord, data: ImageDataset, folder: Path, label: str) -> None:
    """Add a method's predictions on a stream, with sample images.

    Args:
        record: Changed in place.
        data: The stream.
        folder: Where its batches were written.
        label: The method.
    """
    predictions = read_predictions(folder, label, data.classnames)
    if len(predictions) != len(data):  # some images were refused
        return

    known = ~intruders_of(data)
    predictions = predictions.rows(known)
    data = data.subset(known.nonzero()[:, 0].tolist())
    record.classnames = list(data.classnames)
    record.labels = np.asarray(data.labels)
    record.probs = predictions.probs.numpy()
    record.image = lambda index: data[index][0]
