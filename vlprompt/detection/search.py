"""The search of concepts for a frozen detector.

Paper: Yi et al., arXiv 2305.18993. Known (abstract): concepts take the text encoder's place, the visual model is
frozen, the task's loss is the objective. Reconstructed: where a search starts, L vectors per class, all settings.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import box_convert, box_iou

from vlprompt.concepts.embedding import ConceptEmbedding, Concepts, normal_start, repeated, visual_start
from vlprompt.concepts.search import ConceptSearch, SearchResult
from vlprompt.core.errors import DataError
from vlprompt.core.precision import Precision
from vlprompt.detection.base import Detector
from vlprompt.detection.data import DetectionData
from vlprompt.detection.evaluate import average_precision, features
from vlprompt.training.batches import Batch, ReadBatches, epoch_plan
from vlprompt.training.callback_lists import run_callbacks
from vlprompt.training.options import TrainOptions
from vlprompt.training.trainer import Trainer

__all__ = ["ConceptDetection", "DetectionBatches", "class_vectors", "search_concepts"]

Init = Literal["text", "normal", "visual"]

_JITTER = 0.05  # share of a vector's length: the L vectors of a class would stay equal if they started equal


class ConceptDetection(ConceptSearch):
    """Concepts as a detector's classes, trained by its own losses.

    Args:
        detector: The host.
        concepts: What is learned.
        unfreeze: Patterns of the detector's parameters that learn too (second stage).

    Attributes:
        static: Whether what the detector sees of an image stays the same, so that images are encoded once.
    """

    concepts: ConceptEmbedding

    def __init__(self, detector: Detector, concepts: ConceptEmbedding, unfreeze: Sequence[str] = ()) -> None:
        super().__init__(concepts, detector, unfreeze)
        self.detector = [detector]  # in a list: its parameters are not the module's
        names = [name.replace("/", ".") for name, _ in self.unfrozen.named_parameters()]
        self.static = not any(name.startswith(detector.tower) for name in names if detector.tower)

    @property
    def precision(self) -> Precision:
        """What the detector's encoders compute in."""
        return self.detector[0].precision

    def loss(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the host's losses.

        Args:
            batch: ``targets``, and either ``image`` (B, 3, h, w) or ``frozen/<key>``, see :meth:`Detector.frozen`.
        """
        detector = self.detector[0]
        if "image" in batch:
            frozen = detector.frozen(batch["image"])
        else:
            frozen = {}
            for key, value in batch.items():
                if key.startswith("frozen/"):
                    frozen[key.removeprefix("frozen/")] = value.float()

        return detector.losses(frozen, self.concepts(), batch["targets"])

    def to_concepts(self, names: Sequence[str]) -> Concepts:
        """See :meth:`ConceptSearch.to_concepts`."""
        return Concepts("detector", self.concepts().detach(), tuple(names), self.detector[0].identity)


class DetectionBatches(ReadBatches):
    """Batches of images with their objects.

    Args:
        data: Training images.
        detector: The host.
        options: ``batch_size``, ``seed`` and ``drop_last`` are read.
        rows: What :func:`vlprompt.detection.evaluate.features` returned for the images; None: pixels are decoded each
            time, because what the detector sees of them changes.
    """

    def __init__(
        self, data: DetectionData, detector: Detector, options: TrainOptions, rows: dict[str, Tensor] | None
    ) -> None:
        self.data = data
        self.detector = detector
        self.options = options
        self.rows = rows
        self.targets = [objects.target() for objects in data.objects]

    @property
    def reads(self) -> bool:
        """See :attr:`vlprompt.training.batches.ReadBatches.reads`."""
        return self.rows is None

    def plan(self, epoch: int) -> list[NDArray[np.int64]]:
        """See :meth:`vlprompt.training.batches.Batches.plan`."""
        options = self.options
        return epoch_plan(len(self.data), options.batch_size, options.seed, epoch, options.drop_last)

    def fetch(self, indices: NDArray[np.int64], epoch: int) -> Batch:
        """See :meth:`vlprompt.training.batches.Batches.fetch`."""
        batch: Batch = {"targets": [self.targets[i] for i in indices]}
        if self.rows is None:
            images = [self.detector.preprocess(self.data.image(int(i))) for i in indices]
            batch["image"] = torch.stack(images)
        else:
            chosen = torch.as_tensor(indices)
            for key, tensor in self.rows.items():
                batch[f"frozen/{key}"] = tensor[chosen]

        return batch


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
    folder: Path | None = None,
    resume: bool = False,
) -> SearchResult[ConceptDetection]:
    """Search a concept for every class of a data set.

    Args:
        detector: The host; changed only where ``unfreeze`` says so. If the search fails, it is put back.
        train: Images with boxes.
        val: For ``options.select="best"`` (by ``AP``) and the curves; never test data.
        options: Of the trainer.
        length: L, vectors per concept.
        init: Where the search starts: ``text``, the names' features; ``normal``, noise of their spread; ``visual``,
            what the training boxes show.
        unfreeze: Second stage: patterns of the detector's parameters that learn too.
        start: (C, L, d) concepts to start from instead, for example of a first stage.
        folder: Where a checkpoint is saved; None saves none.
        resume: Continue from it.

    Raises:
        DataError: If there are no images, or a class has no object to start from.
        ConfigError: If a pattern matches nothing.
        BackboneError: If class names can't be read.
    """
    if not len(train):
        raise DataError(f"{train.name}: there are no training images.")
    started = time.monotonic()
    concepts = ConceptEmbedding(len(train.classnames), length, detector.width).to(detector.device)
    module = ConceptDetection(detector, concepts, unfreeze)

    rows = features(detector, train) if module.static else None
    val_rows = features(detector, val) if module.static and val is not None else None
    if start is None:
        start = _start(detector, train, init, length, options.seed, rows)
    concepts.begin(start)

    trainer = Trainer(
        module,
        DetectionBatches(train, detector, options, rows),
        options,
        folder,
        validate=None if val is None else (lambda: average_precision(detector, concepts(), val, val_rows)),
        callbacks=run_callbacks(folder),
        identity={
            "detector": detector.identity,
            "precision": detector.precision,
            "data": train.name,
            "start": float(start.norm()),
        },
    )
    with module.unfrozen.restored_on_error():
        history = trainer.run(resume).history
    return SearchResult(module, history, time.monotonic() - started)


def class_vectors(detector: Detector, data: DetectionData) -> Tensor:
    """Return the (C, 1, d) text features of the class names, averaged over the templates."""
    texts = [template.format(name) for name in data.classnames for template in data.templates]
    return detector.read(texts).unflatten(0, (len(data.classnames), -1)).mean(1)[:, None]


def _start(
    detector: Detector,
    data: DetectionData,
    init: Init,
    length: int,
    seed: int,
    rows: dict[str, Tensor] | None,
) -> Tensor:
    """Return the (C, L, d) vectors that a search starts from."""
    if init == "text":
        return repeated(class_vectors(detector, data)[:, 0], length, _JITTER, seed)
    if init == "visual":
        vectors, labels = _object_vectors(detector, data, rows)
        return repeated(visual_start(vectors, labels, data.classnames, norm=1.0), length, _JITTER, seed)

    shape = (len(data.classnames), length, detector.width)
    like = class_vectors(detector, data) if detector.reads_text else None
    return normal_start(shape, like, seed).to(detector.device)


@torch.no_grad()
def _object_vectors(
    detector: Detector, data: DetectionData, rows: dict[str, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Return what the detector sees of every training object.

    Args:
        detector: The host.
        data: Images with boxes.
        rows: What :func:`features` returned for them; None: it is computed.

    Returns:
        (n, d) vectors, each of the box that lies best on an object, and the objects' (n,) classes.
    """
    rows = rows if rows is not None else features(detector, data)
    # Where boxes lie may depend on the concepts; one vector of zeros is the concept of nothing.
    no_concept = torch.zeros(1, 1, detector.width, device=detector.device)
    vectors = []
    labels = []

    for i, objects in enumerate(data.objects):
        target = objects.target()
        if not len(target["labels"]):
            continue

        row = {key: tensor[i : i + 1].float() for key, tensor in rows.items()}
        embeddings = detector.embeds(row)[0]
        boxes = box_convert(detector.detect(row, no_concept.to(embeddings)).boxes[0], "cxcywh", "xyxy")
        true_boxes = box_convert(target["boxes"].to(boxes), "cxcywh", "xyxy")
        best = box_iou(true_boxes, boxes).argmax(1)
        vectors.append(embeddings[best])
        labels.append(target["labels"])

    if not vectors:
        raise DataError(f"{data.name}: no training image has an object to start from.")
    return torch.cat(vectors), torch.cat(labels).to(detector.device)
