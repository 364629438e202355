"""The search of concepts for a frozen detector.

Paper: Yi et al., arXiv 2305.18993. Known (abstract): concepts take the text encoder's place, the visual model is
frozen, the task's loss is the objective. Reconstructed: where a search starts, L vectors per class, all settings.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import box_convert, box_iou

from vlprompt.concepts.embedding import ConceptEmbedding, Concepts, normal_start, repeated, visual_start
from vlprompt.concepts.search import ConceptSearch, SearchResult
from vlprompt.core.errors import DataError
from vlprompt.detection.base import Detector
from vlprompt.detection.data import DetectionData
from vlprompt.detection.evaluate import average_precision, features
from vlprompt.training.batches import Batch, epoch_plan
from vlprompt.training.options import TrainOptions
from vlprompt.training.trainer import Trainer

__all__ = ["ConceptDetection", "DetectionBatches", "class_vectors", "search_concepts"]

Init = Literal["text", "normal", "visual"]


class ConceptDetection(ConceptSearch):
    """Concepts as a detector's classes, trained by its own losses.

    Args:
        detector: The host.
        concepts: What is learned.
        unfreeze: Patterns of the detector's parameters that learn too (second stage).
    """

    concepts: ConceptEmbedding

    def __init__(self, detector: Detector, concepts: ConceptEmbedding, unfreeze: Sequence[str] = ()) -> None:
        super().__init__(concepts, detector, unfreeze)
        self.detector = [detector]
        names = [name.replace("/", ".") for name, _ in self.unfrozen.named_parameters()]
        #: Whether what the detector sees of an image stays the same, so that it may be kept.
        self.static = not any(name.startswith(detector.tower) for name in names if detector.tower)

    def loss(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the host's losses.

        Args:
            batch: ``targets``, and either ``image`` (B, 3, h, w) or ``frozen/<key>``, see :meth:`Detector.frozen`.
        """
        detector = self.detector[0]
        if "image" in batch:
            rows = detector.frozen(batch["image"])
        else:
            rows = {k.removeprefix("frozen/"): t.float() for k, t in batch.items() if k.startswith("frozen/")}
        return detector.losses(rows, self.concepts(), batch["targets"])

    def as_concepts(self, names: Sequence[str]) -> Concepts:
        """See :meth:`ConceptSearch.as_concepts`."""
        return Concepts("detector", self.concepts().detach(), tuple(names), self.detector[0].identity)


class DetectionBatches:
    """Batches of images with their objects; what the detector sees of them is kept if it never changes.

    Args:
        data: Training images.
        detector: The host.
        options: ``batch_size``, ``seed`` and ``drop_last`` are read.
        rows: What :func:`vlprompt.detection.evaluate.features` returned; None: pixels are decoded each time.
    """

    def __init__(
        self, data: DetectionData, detector: Detector, options: TrainOptions, rows: dict[str, Tensor] | None
    ) -> None:
        self.data, self.detector, self.options, self.rows = data, detector, options, rows
        self.targets = [entry.target() for entry in data.objects]

    def plan(self, epoch: int) -> list[NDArray[np.int64]]:
        """See :meth:`vlprompt.training.batches.Batches.plan`."""
        options = self.options
        return epoch_plan(len(self.data), options.batch_size, options.seed, epoch, options.drop_last)

    def fetch(self, indices: NDArray[np.int64], epoch: int) -> Batch:
        """See :meth:`vlprompt.training.batches.Batches.fetch`."""
        batch: Batch = {"targets": [self.targets[i] for i in indices]}
        if self.rows is None:
            images = [self.detector.preprocess(self.data.image(int(i))) for i in indices]
            return {**batch, "image": torch.stack(images)}
        return {**batch, **{f"frozen/{k}": t[torch.as_tensor(indices)] for k, t in self.rows.items()}}


def search_concepts(
    detector: Detector,
    train: DetectionData,
    val: DetectionData | None = None,
    *,
    options: TrainOptions,
    length: int = 1,
    init: Init = "text",
    unfreeze: Sequence[str] = (),
    start: Tensor | None = None,
    resume: bool = False,
    folder: Any = None,
) -> SearchResult[ConceptDetection]:
    """Search a concept for every class of a data set.

    Args:
        detector: The host; changed only where ``unfreeze`` says so.
        train: Images with boxes.
        val: For ``options.select="best"`` (by ``AP``) and the curves; never test data.
        options: Of the trainer.
        length: L, vectors per concept.
        init: Where the search starts: ``text``, the names' features; ``normal``, noise of their spread; ``visual``,
            what the training boxes show.
        unfreeze: Second stage: patterns of the detector's parameters that learn too.
        start: (C, L, d) concepts to start from instead, for example of a first stage.
        resume: Continue from the checkpoint in the folder.
        folder: Where a checkpoint is kept; None keeps none.

    Raises:
        DataError: If there are no images, or a class has no object to start from.
        ConfigError: If a pattern matches nothing.
        BackboneError: If class names can't be read.
    """
    if not len(train):
        raise DataError(f"{train.name}: there are no training images.")
    begun = time.monotonic()
    concepts = ConceptEmbedding(len(train.classnames), length, detector.width).to(detector.device)
    module = ConceptDetection(detector, concepts, unfreeze)
    rows = features(detector, train) if module.static else None
    if start is None:
        start = _start(detector, train, init, length, options.seed, rows)
    concepts.begin(start)
    seen = None if val is None or not module.static else features(detector, val)
    trainer = Trainer(
        module,
        DetectionBatches(train, detector, options, rows),
        options,
        folder,
        validate=None if val is None else (lambda: average_precision(detector, concepts(), val, seen)),
        identity={"detector": detector.identity, "data": train.name, "start": float(start.norm())},
    )
    history = trainer.run(resume).history
    return SearchResult(module, history, time.monotonic() - begun)


def class_vectors(detector: Detector, data: DetectionData) -> Tensor:
    """Return (C, 1, d) what the text encoder says of the class names, averaged over the templates."""
    texts = [t.format(c) for c in data.classnames for t in data.templates]
    return detector.read(texts).unflatten(0, (len(data.classnames), -1)).mean(1)[:, None]


def _start(
    detector: Detector,
    data: DetectionData,
    init: Init,
    length: int,
    seed: int,
    rows: dict[str, Tensor] | None,
) -> Tensor:
    if init == "text":
        return repeated(class_vectors(detector, data)[:, 0], length, 0.05, seed)
    if init == "visual":
        shown, labels = _shown(detector, data, rows)
        return repeated(visual_start(shown, labels, data.classnames, norm=1.0), length, 0.05, seed)
    shape = (len(data.classnames), length, detector.width)
    try:
        told = class_vectors(detector, data)
    except Exception:  # no tokenizer, no text encoder: noise needs neither
        told = None
    return normal_start(shape, told, seed).to(detector.device)


@torch.no_grad()
def _shown(detector: Detector, data: DetectionData, rows: dict[str, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Return (n, d) vectors of the boxes that lie best on the training objects, and the objects' (n,) classes."""
    held = rows if rows is not None else features(detector, data)
    shown, labels = [], []
    for i, entry in enumerate(data.objects):
        target = entry.target()
        if not len(target["labels"]):
            continue
        row = {key: tensor[i : i + 1].float() for key, tensor in held.items()}
        vectors = detector.embeds(row)[0]
        none = vectors.new_zeros(1, 1, detector.width)
        boxes = box_convert(detector.detect(row, none).boxes[0], "cxcywh", "xyxy")
        best = box_iou(box_convert(target["boxes"].to(boxes), "cxcywh", "xyxy"), boxes).argmax(1)
        shown.append(vectors[best])
        labels.append(target["labels"])
    if not shown:
        raise DataError(f"{data.name}: no training image has an object to start from.")
    return torch.cat(shown), torch.cat(labels).to(detector.device)
