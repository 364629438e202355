"""Pretraining of the embedded detector's head on drawn scenes; `tiny` itself stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from pretraining import RECIPES
from vlprompt.core.files import write_json, write_tensors
from vlprompt.core.trainable import Trainable
from vlprompt.data.scenes.attributes import COLOURS
from vlprompt.data.scenes.boxes import BoxScenes
from vlprompt.data.scenes.shapes import GLYPHS, SHAPES
from vlprompt.data.scenes.spec import SceneObject
from vlprompt.data.scenes.wording import words
from vlprompt.detection.boxes import Target, box_losses
from vlprompt.detection.evaluate import average_precision, features
from vlprompt.detection.owl_tiny import OwlTiny
from vlprompt.detection.scenes import scene_boxes
from vlprompt.detection.search import class_vectors
from vlprompt.training.batches import Batch, epoch_plan
from vlprompt.training.callbacks import Callback, TrainingView
from vlprompt.training.options import TrainOptions
from vlprompt.training.trainer import Trainer

__all__ = ["DetectionOptions", "pretrain_detection"]

_TEMPLATES = ("a photo of a {}.", "a {}.")


class DetectionOptions(BaseModel):
    """Options of :func:`pretrain_detection`; a configuration file holds exactly these."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = "pretrain_owl_tiny"
    images: int = Field(6144, ge=2, description="scenes of one to four objects, drawn once")
    seed: int = Field(1, ge=0, description="seeds scenes and the initial weights")
    train: TrainOptions = TrainOptions()


@RECIPES.register(
    "detection",
    summary="the head of the embedded `owl-tiny` on boxes of scenes",
    options=DetectionOptions,
    ships="vlprompt/detection/weights/owl_tiny.safetensors",
)
def pretrain_detection(
    options: DetectionOptions, folder: Path, *, resume: bool = False, workers: int = 1
) -> Path:
    """Train the head from drawing the images to packed weights.

    Args:
        options: What to run.
        folder: Checkpoint, ``history.json`` and the weights go here.
        resume: Continue from the checkpoint in the folder, if there is one.
        workers: Not used: one process draws and encodes.

    Returns:
        Path of the packed weights.
    """
    detector = OwlTiny(weights="random", seed=options.seed)
    queries = Queries(detector)
    module = HeadModule(detector, queries)
    batches = BoxBatches(options, detector, queries)
    ship = _Ship(module, folder)
    watch = _Watch(detector)
    identity = options.model_dump(mode="json", exclude={"train"})
    Trainer(module, batches, options.train, folder, watch, [ship], identity).run(resume)

    return ship.path


class Queries:
    """Three vocabularies that batches take in turn: shapes, colours, and both together as far as they are seen.

    Attributes:
        vectors: (C, d) features of each vocabulary's names.
    """

    def __init__(self, detector: OwlTiny) -> None:
        shapes = [*SHAPES, *GLYPHS]
        said = {s: words("shape", s)[0] if s in SHAPES else f"digit {s}" for s in shapes}
        self.kinds: list[dict[tuple[str, ...], str]] = [
            {(s,): said[s] for s in shapes},
            {(c,): f"{words('colour', c)[0]} object" for c in COLOURS},
            {(s, c): f"{words('colour', c)[0]} {said[s]}" for s in shapes for c in COLOURS},
        ]
        self.numbers = [{key: i for i, key in enumerate(kind)} for kind in self.kinds]
        self.vectors = [detector.backbone.class_weights(list(k.values()), _TEMPLATES) for k in self.kinds]

    def labels(self, kind: int, items: tuple[SceneObject, ...]) -> Tensor:
        """Return the (T,) numbers of objects in a vocabulary."""
        keys = [((i.shape,), (i.colour,), (i.shape, i.colour))[kind] for i in items]
        return torch.tensor([self.numbers[kind][key] for key in keys], dtype=torch.long)


class BoxBatches:
    """Batches of token states, kept as float16, with objects named in one vocabulary per batch."""

    def __init__(self, options: DetectionOptions, detector: OwlTiny, queries: Queries) -> None:
        scenes = BoxScenes(options.images, "", "pretraining", "any", options.seed)
        self.options = options.train
        self.boxes = []
        self.items: list[tuple[SceneObject, ...]] = []
        self.queries = queries
        rows = []

        for start in range(0, len(scenes), 128):
            boxes_drawn = [scenes.boxes(i) for i in range(start, min(start + 128, len(scenes)))]
            pixels = [detector.preprocess(Image.fromarray(image)) for image, _, _ in boxes_drawn]
            rows.append(detector.frozen(torch.stack(pixels))["features"].half())

            for image, boxes, items in boxes_drawn:
                x0, y0, x1, y1 = (torch.from_numpy(boxes) / image.shape[0]).T
                self.boxes.append(torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], -1))
                self.items.append(items)

        self.features = torch.cat(rows)

    def plan(self, epoch: int) -> list[NDArray[np.int64]]:
        """See :meth:`vlprompt.training.batches.Batches.plan`."""
        return epoch_plan(len(self.features), self.options.batch_size, self.options.seed, epoch)

    def fetch(self, indices: NDArray[np.int64], epoch: int) -> Batch:
        """See :meth:`vlprompt.training.batches.Batches.fetch`."""
        kind = (epoch + int(indices[0])) % 3
        targets: list[Target] = [
            {"labels": self.queries.labels(kind, self.items[i]), "boxes": self.boxes[i]} for i in indices
        ]
        return {"features": self.features[torch.from_numpy(indices)], "targets": targets, "kind": kind}


class HeadModule(nn.Module, Trainable):
    """The detector's head, trained from scratch."""

    def __init__(self, detector: OwlTiny, queries: Queries) -> None:
        super().__init__()
        self.head = detector.head.requires_grad_(True)
        self._detector = [detector]
        self.queries = queries

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return the losses of a batch of :class:`BoxBatches`."""
        vectors = self.queries.vectors[batch["kind"]][:, None]
        detections = self._detector[0].detect({"features": batch["features"].float()}, vectors)
        return box_losses(detections.logits.float(), detections.boxes.float(), batch["targets"])

    def trainable_state(self) -> dict[str, Tensor]:
        """Return the head's tensors by name."""
        return {n: t.detach() for n, t in self.head.state_dict().items()}

    def load_trainable_state(self, state: Any) -> None:
        """Put tensors back, strictly."""
        self.head.load_state_dict(dict(state), strict=True)


class _Watch:
    """AP of class names on validation scenes."""

    def __init__(self, detector: OwlTiny) -> None:
        self.detector = detector
        self.sets = {name: scene_boxes(f"scenes/{name}", "val") for name in ("shape", "shape_colour")}
        self.rows = {name: features(detector, data) for name, data in self.sets.items()}

    def __call__(self) -> dict[str, float]:
        figures: dict[str, float] = {}
        for name, data in self.sets.items():
            scores = average_precision(
                self.detector, class_vectors(self.detector, data), data, self.rows[name]
            )
            figures |= {f"{name}/{key}": scores[key] for key in ("AP", "AP50")}

        return figures


class _Ship(Callback):
    """Writes the packed weights and the history after every epoch."""

    def __init__(self, module: HeadModule, folder: Path) -> None:
        self.module = module
        self.folder = folder
        self.path = folder / "owl_tiny.safetensors"

    def on_epoch(self, trainer: TrainingView, record: dict[str, Any]) -> None:
        """Write both files and one line."""
        write_json(self.folder / "history.json", trainer.progress.history)
        packed = {n: t.half() for n, t in self.module.trainable_state().items()}
        write_tensors(self.path, packed, {"history": trainer.progress.history})
        print(
            " ".join(f"{k} {v:.4g}" for k, v in record.items()),
            f"{trainer.progress.seconds:.0f} s",
            flush=True,
        )
