"""Scores of a learner on a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vlprompt.backbones.vision import Images
from vlprompt.classification.label_space import check_learner, dataset_for, in_learner_space
from vlprompt.classification.prefixes import KeptStates, kept_states
from vlprompt.core.options import check_counts
from vlprompt.core.shares import share_rows
from vlprompt.data import FeatureCache, ImageDataset
from vlprompt.data.compositions import CompositionDataset
from vlprompt.data.loading import Loader, Workers, takes_workers
from vlprompt.learners import Learner
from vlprompt.learners._scanning import ImageScanner
from vlprompt.metrics.backdoor import verdict_metrics
from vlprompt.metrics.classification import DEFAULT_METRICS, MULTI_LABEL_DEFAULTS, compute

__all__ = ["ImageReader", "encoder_of", "evaluate", "image_embeddings", "predict_logits"]


@takes_workers
def evaluate(
    learner: Learner,
    data: ImageDataset | Any,
    *,
    metrics: Sequence[str] | None = None,
    batch_size: int = 100,
    cache: FeatureCache | None = None,
    workers: Workers | None = None,
) -> dict[str, float]:
    """Return metrics of a learner on a labelled data set, fractions in [0, 1] except ``nll`` (nats).

    ``score`` is the data set's own measure, which its card names (accuracy if it has none); it comes on top of the
    metrics asked for, under both names.

    Args:
        learner: See :func:`vlprompt.create_learner`.
        data: The learner must know all its classes; they may be fewer, in another order or in capitals. Images compete
            against all classes of the learner. A torch ``Dataset`` or a list of pairs too, see :func:`vlprompt.fit`.
        metrics: Names, see :data:`vlprompt.metrics.classification.METRICS`; None for those that are usual for the
            kind of labels.
        batch_size: Images per pass.
        cache: Where image features are stored, or what the tower makes of images below the first place where
            something learned enters it.
        workers: Processes that read images; see :data:`vlprompt.data.loading.Workers`.

    Raises:
        DataError: If the learner doesn't know a class, or ``batch_size`` is below 1.
        UnknownNameError: For an unknown metric.
    """
    check_learner(learner)
    metrics = [metrics] if isinstance(metrics, str) else metrics
    data = in_learner_space(learner, dataset_for(learner, data, "test"))
    cache = FeatureCache(prefix_gib=0) if cache is None else cache  # for features that are read twice here
    logits, labels = predict_logits(learner, data, batch_size=batch_size, cache=cache)
    if data.multi_label:
        labels = torch.from_numpy(data.multi_hot())

    headline = str(data.info.get("metric", "accuracy"))
    names = metrics
    if names is None:
        names = MULTI_LABEL_DEFAULTS if data.multi_label else DEFAULT_METRICS
    numbers = compute(logits, labels, list(dict.fromkeys([*names, headline])))

    if metrics is None and isinstance(data, CompositionDataset) and isinstance(learner, ImageScanner):
        rows = image_embeddings(learner, data, batch_size=batch_size, cache=cache)
        numbers |= verdict_metrics(learner.judge(rows), data, learner.threshold)

    return {**numbers, "score": numbers[headline]}


@torch.no_grad()
def predict_logits(
    learner: Learner, data: ImageDataset, *, batch_size: int = 100, cache: FeatureCache | None = None
) -> tuple[Tensor, Tensor]:
    """Return (n, C) logits and (n,) labels on the CPU, in the data set's order; arguments as :func:`evaluate`.

    The label of an image that has several is its first; :meth:`ImageDataset.multi_hot` has all.
    """
    check_counts(batch_size=batch_size)
    data = in_learner_space(learner, data)
    device = learner.backbone.device
    was_training = learner.training

    learner.eval()
    try:
        if learner.static_images:
            embeddings = image_embeddings(learner, data, batch_size=batch_size, cache=cache)
            parts = [learner.logits(part.to(device)) for part in embeddings.split(4096)]
        else:
            # Without a cache that outlives the call, nothing is kept.
            states = kept_states(learner, data, cache, size=batch_size, full_passes=False) if cache else []

            def score(rows: range) -> list[Tensor]:
                batches = _image_batches(learner, data, rows, batch_size, states)
                logits = [learner(batch.to(device, non_blocking=True)).float().cpu() for batch in batches]
                return [torch.cat(logits)]

            parts = share_rows(len(data), batch_size, score)
    finally:
        learner.train(was_training)

    logits = torch.cat([part.float().cpu() for part in parts])
    return logits, torch.tensor(data.labels)


def image_embeddings(
    learner: Any, data: ImageDataset, *, batch_size: int = 100, cache: FeatureCache | None = None
) -> Tensor:
    """Return (n, d) embeddings by the frozen image tower, not normalised, through the feature cache."""
    check_counts(batch_size=batch_size)
    encode, fingerprint = encoder_of(learner)
    return (cache or FeatureCache()).features(
        data, encode, learner.preprocess, fingerprint=fingerprint, batch_size=batch_size
    )


def encoder_of(learner: Any) -> tuple[Callable[[Tensor], Tensor], str]:
    """Return what turns images into the rows that are cached for a learner, and the rows' fingerprint."""
    backbone = learner.backbone
    if learner.static_images:
        return learner.embed_images, f"{backbone.features_id}{learner.reads}{learner.preparation}"
    return backbone.image_embeddings, f"{backbone.features_id}{learner.preparation}"


def _image_batches(
    learner: Learner, data: ImageDataset, rows: range, size: int, states: Sequence[KeptStates]
) -> Iterator[Images]:
    """Yield (B, 3, H, W) preprocessed images of some rows in order, or what a kept prefix holds of them."""
    if states:
        yield from (states[0][part] for part in torch.tensor(rows).split(size))
    else:
        pin = learner.backbone.device.type == "cuda"
        yield from ImageReader(data, learner.preprocess).batches(size, pin, rows)


@dataclass(frozen=True)
class ImageReader:
    """Reads images of a data set for a classifier.

    Attributes:
        data: The data set.
        preprocess: The classifier's.
    """

    data: ImageDataset
    preprocess: Callable[[Image.Image], Tensor]

    def __call__(self, rows: range) -> Tensor:
        """Return (B, 3, H, W) preprocessed images of some rows."""
        return torch.stack([self.preprocess(self.data[i][0]) for i in rows])

    def batches(self, size: int, pin: bool = False, rows: range | None = None) -> Iterator[Tensor]:
        """Yield all images, or consecutive rows, in the data set's order, ``size`` at a time."""
        rows = range(len(self.data)) if rows is None else rows
        with Loader(self, pin=pin) as loader:
            yield from loader.stream([rows[first : first + size] for first in range(0, len(rows), size)])
