"""Scores of a learner on a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from vlprompt.backbones.vision import Images
from vlprompt.classification.label_space import in_learner_space
from vlprompt.classification.prefixes import kept_states
from vlprompt.data import FeatureCache, ImageDataset
from vlprompt.data.compositions import CompositionDataset
from vlprompt.learners import Learner
from vlprompt.learners._scanning import ImageScanner
from vlprompt.metrics.backdoor import verdict_metrics
from vlprompt.metrics.classification import DEFAULT_METRICS, MULTI_LABEL_METRICS, compute

__all__ = ["encoder_of", "evaluate", "image_embeddings", "predict_logits"]


def evaluate(
    learner: Learner,
    data: ImageDataset,
    *,
    metrics: Sequence[str] | None = None,
    batch_size: int = 100,
    cache: FeatureCache | None = None,
) -> dict[str, float]:
    """Return metrics of a learner on a labelled data set, fractions in [0, 1] except ``nll`` (nats).

    ``score`` is the data set's own measure, which its card names (accuracy if it has none); it comes on top of the
    metrics asked for, under both names.

    Args:
        learner: See :func:`vlprompt.create_learner`.
        data: The learner must know all its classes; they may be fewer, in another order or in capitals. Images compete
            against all classes of the learner.
        metrics: Names, see :data:`vlprompt.metrics.classification.METRICS`; None for those that are usual for the
            kind of labels.
        batch_size: Images per pass.
        cache: Where image features are stored, or what the tower makes of images below the first place where
            something learned enters it.

    Raises:
        DataError: If the learner doesn't know a class.
    """
    data = in_learner_space(learner, data)
    cache = FeatureCache(prefix_gib=0) if cache is None else cache  # for features that are read twice here
    logits, labels = predict_logits(learner, data, batch_size=batch_size, cache=cache)
    if data.multi_label:
        labels = torch.from_numpy(data.multi_hot())

    headline = str(data.info.get("metric", "accuracy"))
    names = metrics
    if names is None:
        names = MULTI_LABEL_METRICS if data.multi_label else DEFAULT_METRICS
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
    data = in_learner_space(learner, data)
    device = learner.backbone.device
    was_training = learner.training

    learner.eval()
    try:
        if learner.static_images:
            embeddings = image_embeddings(learner, data, batch_size=batch_size, cache=cache)
            parts = [learner.logits(part.to(device)) for part in embeddings.split(4096)]
        else:
            parts = [learner(batch.to(device)) for batch in _image_batches(learner, data, batch_size, cache)]
    finally:
        learner.train(was_training)

    logits = torch.cat([part.float().cpu() for part in parts])
    return logits, torch.tensor(data.labels)


def image_embeddings(
    learner: Any, data: ImageDataset, *, batch_size: int = 100, cache: FeatureCache | None = None
) -> Tensor:
    """Return (n, d) embeddings by the frozen image tower, not normalised, through the feature cache."""
    encode, fingerprint = encoder_of(learner)
    return (cache or FeatureCache()).features(
        data, encode, learner.backbone.preprocess, fingerprint=fingerprint, batch_size=batch_size
    )


def encoder_of(learner: Any) -> tuple[Callable[[Tensor], Tensor], str]:
    """Return what turns images into the rows that are cached for a learner, and the rows' fingerprint."""
    backbone = learner.backbone
    if learner.static_images:
        return learner.embed_images, f"{backbone.fingerprint['id']}{learner.reads}"
    return backbone.image_embeddings, backbone.fingerprint["id"]


def _image_batches(
    learner: Learner, data: ImageDataset, size: int, cache: FeatureCache | None
) -> Iterator[Images]:
    """Yield (B, 3, H, W) preprocessed images in the data set's order, or what a kept prefix holds of them.

    Without a cache that outlives the call, nothing is kept.
    """
    states = [] if cache is None else kept_states(learner, data, cache, size=size, full_passes=False)
    if states:
        yield from (states[0][rows] for rows in torch.arange(len(data)).split(size))
        return

    for start in range(0, len(data), size):
        end = min(start + size, len(data))
        yield torch.stack([learner.backbone.preprocess(data[i][0]) for i in range(start, end)])
