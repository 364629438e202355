"""Scores of a segmentation model on a data set, at the masks' own size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vlprompt.backbones import Backbone
from vlprompt.core.errors import CheckpointError, DataError
from vlprompt.data.segmentation.base import IGNORE, MaskDataset
from vlprompt.metrics.masks import PairScore, mean_iou_of_maps, score_pair, summarise_pairs
from vlprompt.saved.prompts import PromptCard, backbone_of, check_kind, read
from vlprompt.segmentation import create_segmenter
from vlprompt.segmentation.base import Segmenter
from vlprompt.segmentation.states import PairStates

__all__ = [
    "SegmentationScores",
    "build_segmenter",
    "evaluate_segmenter",
    "load_trained",
    "predict_mask",
    "probabilities",
]

Loss = Callable[[Tensor, Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class SegmentationScores:
    """What was measured.

    Attributes:
        metrics: See :func:`vlprompt.metrics.masks.summarise_pairs`.
        pairs: One entry per pair, in the data set's order.
    """

    metrics: dict[str, float]
    pairs: list[PairScore]


@torch.no_grad()
def evaluate_segmenter(
    segmenter: Segmenter,
    data: MaskDataset,
    *,
    threshold: float = 0.5,
    batch_size: int = 16,
    boundary: bool = True,
    argmax: bool = False,
    loss: Loss | None = None,
    states: PairStates | None = None,
) -> SegmentationScores:
    """Segment every pair and compare with its mask.

    Which pairs are asked is the data set's matter (``queries`` of ``load_segmentation``): only classes that an image
    shows, TuneVLSeg's protocol, which no false find can lower, or all.

    Args:
        segmenter: The model.
        data: The pairs.
        threshold: Probability above which a pixel is inside.
        batch_size: Pairs at once.
        boundary: Whether to measure the distance of boundaries.
        argmax: Let the classes compete too: every pixel gets the likeliest class above the threshold, else ground, and
            ``argmax_miou`` is measured; needs a data set loaded with ``queries="all"``.
        loss: Adds the mean ``loss`` at the model's size to the metrics.
        states: Frozen states from an earlier call with the same model and data.

    Raises:
        DataError: For ``argmax`` where images aren't asked for all classes.
    """
    if argmax and data.info.get("queries") != "all":
        raise DataError(
            f"{data.name}: argmax needs every class asked of every image: load it with queries='all'."
        )
    was_training = segmenter.training
    segmenter.eval()
    source = states or PairStates(segmenter, data, batch_size, limit_mb=0.0)
    scores: list[PairScore] = []
    total = 0.0
    maps = _ClassMaps(threshold)
    try:
        for pairs in _batches(data, batch_size):
            frozen, size = source.frozen(pairs)
            logits = segmenter.decode(frozen, [data.samples[i].phrase for i in pairs], size)
            if loss is not None:
                target = source.targets(pairs, size).to(logits.device)
                total += float(torch.stack(list(loss(logits, target).values())).sum()) * len(pairs)
            for row, index in zip(logits, pairs, strict=True):
                mask, sample = source.mask(index), data.samples[index]
                probs = probabilities(row, mask.shape)
                scores.append(score_pair(probs > threshold, mask, sample.record, sample.label, boundary))
                if argmax:
                    maps.add(sample.source, sample.label, probs, mask)
    finally:
        segmenter.train(was_training)
    metrics = summarise_pairs(scores, data.classnames)
    if loss is not None:
        metrics["loss"] = total / len(scores)
    if argmax:
        metrics |= mean_iou_of_maps(*maps.counts(), data.classnames)
    return SegmentationScores(metrics, scores)


def probabilities(logits: Tensor, size: Sequence[int]) -> NDArray[np.float32]:
    """Return (H, W) probabilities at an image's own size: the (1, h, w) logits resized bilinearly, then squashed."""
    rows = logits.float()[None]
    if tuple(rows.shape[-2:]) != tuple(size):
        rows = F.interpolate(rows, size=tuple(size), mode="bilinear", align_corners=False)
    return np.asarray(rows[0, 0].sigmoid().cpu().numpy(), np.float32)


def load_trained(path: str | Path, backbone: Backbone | None = None) -> Segmenter:
    """Return a saved segmentation model. No code in the files can run.

    Args:
        path: The folder that :func:`vlprompt.save` wrote.
        backbone: The backbone it was trained on; None builds it from the name in the file.

    Raises:
        CheckpointError: If a file is missing, damaged or hostile, holds a classifier, or the backbone is another one.
        BackboneError: If the backbone's weights can't be fetched.
    """
    card, tensors = read(path)
    return build_segmenter(path, card, tensors, backbone)


def build_segmenter(
    path: str | Path, card: PromptCard, tensors: Mapping[str, Tensor], backbone: Backbone | None = None
) -> Segmenter:
    """Return the model of a card and tensors that were read already; arguments and errors as :func:`load_trained`."""
    check_kind(path, card, "segmenter")
    backbone = backbone_of(path, card, backbone)
    try:
        segmenter = create_segmenter(card.method, backbone, **card.options)
    except TypeError as error:
        raise CheckpointError(f"{path} is not a prompt card of ours: {error}.") from error
    segmenter.load_trainable_state(tensors)
    return segmenter.eval()


@torch.no_grad()
def predict_mask(segmenter: Segmenter, image: object, phrase: str) -> NDArray[np.float32]:
    """Return (H, W) probabilities of one PIL image's pixels, at its own size."""
    from PIL import Image

    assert isinstance(image, Image.Image)
    pixels = segmenter.preprocess(image)[None]
    return probabilities(segmenter(pixels, [phrase])[0], (image.height, image.width))


class _ClassMaps:
    """Counts overlaps of class maps; pairs arrive image by image."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.inter: dict[int, int] = {}
        self.union: dict[int, int] = {}
        self._image: object = None
        self._held: dict[int, tuple[NDArray[np.float32], NDArray[np.uint8]]] = {}

    def add(self, image: object, label: int, probs: NDArray[np.float32], mask: NDArray[np.uint8]) -> None:
        if image != self._image:
            self._close()
            self._image = image
        self._held[label] = (probs, mask)

    def counts(self) -> tuple[dict[int, int], dict[int, int]]:
        self._close()
        return self.inter, self.union

    def _close(self) -> None:
        if not self._held:
            return
        labels = list(self._held)
        probs = np.stack([p for p, _ in self._held.values()])
        best = np.where(probs.max(0) > self.threshold, np.asarray(labels)[probs.argmax(0)], -1)
        counts = np.all([m != IGNORE for _, m in self._held.values()], axis=0)
        for label, (_, mask) in self._held.items():
            ours, true = (best == label) & counts, (mask == 1) & counts
            self.inter[label] = self.inter.get(label, 0) + int((ours & true).sum())
            self.union[label] = self.union.get(label, 0) + int((ours | true).sum())
        self._held = {}


def _batches(data: MaskDataset, size: int) -> list[list[int]]:
    """Cut the pairs into batches; they follow each other by image."""
    order = [i for pairs in data.images().values() for i in pairs]
    return [order[i : i + size] for i in range(0, len(order), size)]
