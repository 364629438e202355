"""Scores of a segmentation model on a data set, at the size of the masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vlprompt.backbones import Backbone
from vlprompt.core.errors import CheckpointError, DataError, NonFiniteError
from vlprompt.core.options import check_counts, check_switches
from vlprompt.data.segmentation.base import IGNORE, MaskDataset, check_pairs
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
    """Scores of a data set.

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

    The data set says which pairs are asked (``queries`` of ``load_segmentation``): only the classes that an image
    shows, which is TuneVLSeg's protocol and counts no false positives, or all classes.

    Args:
        segmenter: The model.
        data: The pairs.
        threshold: Probability above which a pixel is inside.
        batch_size: Pairs at once.
        boundary: Whether to measure the distance of boundaries.
        argmax: Let the classes compete too: every pixel gets the likeliest class above the threshold, else background,
            and ``argmax_miou`` is measured. It needs a data set loaded with ``queries="all"``.
        loss: Adds the mean ``loss`` at the model's size to the metrics.
        states: Frozen states from an earlier call with the same model and data.

    Raises:
        DataError: For ``argmax`` where images aren't asked for all classes; if the data are no pairs; for numbers
            out of their range.
        NonFiniteError: If a logit is NaN.
    """
    check_pairs(data)
    check_counts(batch_size=batch_size)
    check_switches(boundary=boundary, argmax=argmax)
    if isinstance(threshold, str) or not 0 <= threshold <= 1:
        raise DataError(f"threshold is a probability in [0, 1], got {threshold!r}.")
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
        for pairs, frozen, size in source.stream(_batches(data, batch_size)):
            phrases = [data.samples[i].phrase for i in pairs]
            logits = segmenter.decode(frozen, phrases, size)
            if loss is not None:
                target = source.targets(pairs, size).to(logits.device)
                parts = list(loss(logits, target).values())
                total += float(torch.stack(parts).sum()) * len(pairs)

            for row, index in zip(logits, pairs, strict=True):
                mask = source.mask(index)
                sample = data.samples[index]
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
    """Return (H, W) probabilities at an image's own size.

    Args:
        logits: (1, h, w); they are resized bilinearly before the sigmoid.
        size: (H, W).

    Raises:
        NonFiniteError: If a logit is NaN: a mask of it would look as if nothing were there.
    """
    batch = logits.float()[None]
    if bool(batch.isnan().any()):
        raise NonFiniteError(
            "the logits of a mask are NaN. What was learned is damaged, or the precision (fp16) is too small for this "
            "backbone: train again, or use bf16 or fp32."
        )
    if tuple(batch.shape[-2:]) != tuple(size):
        batch = F.interpolate(batch, size=tuple(size), mode="bilinear", align_corners=False)
    return np.asarray(batch[0, 0].sigmoid().cpu().numpy(), np.float32)


def load_trained(path: str | Path, backbone: Backbone | Mapping[str, Any] | None = None) -> Segmenter:
    """Return a saved segmentation model. No code in the files can run.

    Args:
        path: The folder, or that of the cell or run which saved it, if it saved no other.
        backbone: See :func:`vlprompt.load`.

    Raises:
        CheckpointError: If a file is missing, damaged or hostile, holds a classifier, or the backbone is another one.
        BackboneError: If the backbone's weights can't be fetched.
    """
    card, tensors = read(path)
    return build_segmenter(path, card, tensors, backbone)


def build_segmenter(
    path: str | Path,
    card: PromptCard,
    tensors: Mapping[str, Tensor],
    backbone: Backbone | Mapping[str, Any] | None = None,
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
def predict_mask(segmenter: Segmenter, image: Image.Image, phrase: str) -> NDArray[np.float32]:
    """Return (H, W) probabilities of an image's pixels, at its own size."""
    pixels = segmenter.preprocess(image)[None]
    return probabilities(segmenter(pixels, [phrase])[0], (image.height, image.width))


class _ClassMaps:
    """Counts overlaps of class maps, in which classes compete for every pixel.

    Pairs must arrive image by image: the map of an image is made when all its classes are there.

    Args:
        threshold: Probability that the likeliest class must exceed.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.intersections: dict[int, int] = {}
        self.unions: dict[int, int] = {}
        self._image: object = None
        self._pairs: dict[int, tuple[NDArray[np.float32], NDArray[np.uint8]]] = {}

    def add(self, image: object, label: int, probs: NDArray[np.float32], mask: NDArray[np.uint8]) -> None:
        """Add one class of an image.

        Args:
            image: What identifies it.
            label: Of the class.
            probs: (H, W).
            mask: (H, W) of 0, 1 and 255.
        """
        if image != self._image:
            self._close()
            self._image = image
        self._pairs[label] = (probs, mask)

    def counts(self) -> tuple[dict[int, int], dict[int, int]]:
        """Return label to pixels in both maps, and label to pixels in either."""
        self._close()
        return self.intersections, self.unions

    def _close(self) -> None:
        """Make the map of the image whose classes are all there, and count its overlaps."""
        if not self._pairs:
            return

        labels = np.asarray(list(self._pairs))
        probs = np.stack([probs for probs, _ in self._pairs.values()])
        predicted = np.where(probs.max(0) > self.threshold, labels[probs.argmax(0)], -1)
        counts = np.all([mask != IGNORE for _, mask in self._pairs.values()], axis=0)

        for label, (_, mask) in self._pairs.items():
            ours = (predicted == label) & counts
            true = (mask == 1) & counts
            intersection = int((ours & true).sum())
            union = int((ours | true).sum())
            self.intersections[label] = self.intersections.get(label, 0) + intersection
            self.unions[label] = self.unions.get(label, 0) + union

        self._pairs = {}


def _batches(data: MaskDataset, size: int) -> list[list[int]]:
    """Cut the pairs into batches; they follow each other by image."""
    order = [i for pairs in data.images().values() for i in pairs]
    return [order[i : i + size] for i in range(0, len(order), size)]
