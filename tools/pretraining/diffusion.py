"""Pretraining of the embedded ``tiny-diffusion`` on captioned scenes, from drawing images to packed weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

from pretraining import RECIPES
from pretraining.corpus import render_all
from pretraining.denoising import ConditionedBatches, DenoisingModule, SketchBatches, SketchModule
from pretraining.mixed import Mixed, mixed
from vlprompt.backbones import Backbone, create_backbone
from vlprompt.core.files import read_tensors, write_atomic, write_json, write_tensors
from vlprompt.core.seeding import derive_seed, torch_rng
from vlprompt.data.scenes.pairs import CaptionPairs
from vlprompt.data.scenes.tasks import build
from vlprompt.diffusion.denoiser import Denoiser, load_denoiser
from vlprompt.training.callbacks import Callback, TrainingView
from vlprompt.training.options import TrainOptions
from vlprompt.training.trainer import Trainer

__all__ = ["DiffusionOptions", "pretrain_diffusion"]

#: Tasks that a run is watched on: does `tiny` name variations like their source?
WATCHED = ("shape", "colour", "pattern", "count", "position", "background")

#: Tasks whose classes are the answers that originals and denoised images are compared on.
ASKED = ("kind", "glyph", "shape", "colour", "pattern", "size", "position", "count", "background")


class DiffusionOptions(BaseModel):
    """Options of :func:`pretrain_diffusion`; a configuration file holds exactly these."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = "pretrain_tiny_diffusion"
    images: int = Field(24576, ge=2, description="captioned scenes that are drawn once")
    easy: int = Field(8192, ge=0, description="so many of them show a single large object")
    captions: int = Field(3, ge=2, description="embedded captions per image")
    drop: float = Field(0.1, ge=0, lt=1, description="share without condition, for guidance")
    worded: float = Field(0.2, ge=0, le=0.75, description="share conditioned on captions alone")
    perception: float = Field(0.5, ge=0, description="weight of the comparison of embeddings")
    naming: float = Field(0.05, ge=0, description="weight of the comparison of fitting captions")
    asking: float = Field(0.0, ge=0, description="weight of the comparison of the tasks' answers")
    focus: float = Field(
        1.0, ge=1, description="how often there is hardly anything but noise; 1: as all times"
    )
    watched: float = Field(0.5, ge=0, le=1, description="share of each batch that they are compared on")
    decay: float = Field(0.998, gt=0, lt=1, description="of the running average of weights that is shipped")
    watch: int = Field(40, ge=1, description="images per task whose variations are watched")
    steps: int = Field(2, ge=1, description="denoising steps of watched variations")
    seed: int = Field(1, ge=0, description="seeds scenes, captions and the initial weights")
    start: Path | None = Field(None, description="packed weights to go on from; then without a sketch first")
    keep: float = Field(0.0, ge=0, le=1, description="share of the starting weights in those that are packed")
    sketch: TrainOptions = Field(TrainOptions(), description="of the canvas alone, first")
    train: TrainOptions = TrainOptions()
    precision: Mixed = Field("fp32", description="of the products in train; weights stay float32")

    @field_validator("keep")
    @classmethod
    def _of_something(cls, value: float, info: ValidationInfo) -> float:
        if value and not info.data.get("start"):
            raise ValueError("keeps a share of the weights that start names; there is no start")
        return value


@RECIPES.register(
    "diffusion",
    summary="the embedded `tiny-diffusion` on captioned scenes",
    options=DiffusionOptions,
    ships="vlprompt/diffusion/weights/tiny_diffusion.safetensors",
)
def pretrain_diffusion(
    options: DiffusionOptions, folder: Path, *, resume: bool = False, workers: int = 1
) -> Path:
    """Run a pretraining from drawing the images to packed weights.

    Args:
        options: What to run.
        folder: Pixels, embeddings, checkpoint, ``history.json``, ``samples.png`` and the weights go here.
        resume: Continue from the checkpoint in the folder, if there is one.
        workers: Processes that draw images.

    Returns:
        Path of the packed weights.
    """
    backbone = create_backbone("tiny")
    pairs = CaptionPairs(options.images, options.seed, easy=options.easy, balanced=True)
    images = render_all(pairs, folder / "scenes.u8", workers)
    image_embeddings, text_embeddings = _embeddings(pairs, images, options.captions, backbone, folder)
    told_of = (options.drop, options.worded)
    batches = ConditionedBatches(
        images,
        image_embeddings,
        text_embeddings,
        options.train.batch_size,
        options.train.seed,
        *told_of,
        options.focus,
    )
    tasks_asked = [build(task, "train") for task in ASKED] if options.asking else []
    answers = [backbone.class_weights(data.classnames, data.templates) for data in tasks_asked]
    module = DenoisingModule(
        backbone,
        options.seed,
        options.perception,
        options.watched,
        options.decay,
        options.naming,
        options.asking,
        answers,
    )
    identity = options.model_dump(mode="json", exclude={"train", "sketch"})
    before: dict[str, Tensor] = {}

    if options.start:
        before = load_denoiser(options.start).state_dict()
        module.denoiser.load_state_dict(before)
    else:
        sketches = SketchBatches(
            images,
            image_embeddings,
            text_embeddings,
            options.sketch.batch_size,
            options.sketch.seed,
            *told_of,
        )
        Trainer(
            SketchModule(module.denoiser), sketches, options.sketch, folder / "sketch", identity=identity
        ).run(resume)

    module.restart_average()
    watch = _Watch(module, backbone, options.watch, options.steps, folder)
    ship = _Ship(module, folder, before, options.keep)
    Trainer(mixed(module, options.precision), batches, options.train, folder, watch, [ship], identity).run(
        resume
    )

    return ship.path


def _embeddings(
    pairs: CaptionPairs, images: np.ndarray, captions: int, backbone: Backbone, folder: Path
) -> tuple[Tensor, Tensor]:
    """Return (N, d) embeddings of the images and (N, K, d) of their captions, computed once and kept."""
    key = derive_seed(pairs.seed, backbone.fingerprint["id"], len(pairs), pairs.easy, captions)
    path = folder / f"embeddings-{key:x}.safetensors"
    if not path.is_file():
        rows = []
        for start in range(0, len(images), 256):
            block = torch.from_numpy(np.array(images[start : start + 256])).permute(0, 3, 1, 2)
            rows.append(backbone.encode_image(_preprocessed(block, backbone)))

        texts = [c.text for i in range(len(pairs)) for c in pairs.captions(i, captions)]
        distinct = sorted(set(texts))
        parts = [backbone.encode_text(distinct[i : i + 512]) for i in range(0, len(distinct), 512)]
        position = {text: number for number, text in enumerate(distinct)}
        text_embeddings = torch.cat(parts)[[position[text] for text in texts]]
        write_tensors(path, {"seen": torch.cat(rows), "told": text_embeddings.view(len(pairs), captions, -1)})

    tensors, _ = read_tensors(path)
    return tensors["seen"], tensors["told"]


def _preprocessed(images: Tensor, backbone: Backbone) -> Tensor:
    """Return (B, 3, 64, 64) pixels as `tiny` takes them, of uint8 or [0, 1] images of its own size."""
    facts = backbone.fingerprint["preprocess"]
    scaled = images.float() / 255 if images.dtype == torch.uint8 else images
    return tvf.normalize(scaled, list(facts["mean"]), list(facts["std"]))


class _Watch:
    """The share of variations, by the running average of the weights, that `tiny` names like their source."""

    def __init__(
        self, module: DenoisingModule, backbone: Backbone, count: int, steps: int, folder: Path
    ) -> None:
        self.module = module
        self.backbone = backbone
        self.steps = steps
        self.folder = folder
        self.denoiser = Denoiser().eval()
        self.tasks = {}

        for task in WATCHED:
            data = build(task, "val")
            chosen = np.linspace(0, len(data) - 1, min(count, len(data))).astype(int)
            images = np.stack([np.asarray(data[int(i)][0]) for i in chosen])
            heads = backbone.class_weights(data.classnames, data.templates)
            self.tasks[task] = (torch.from_numpy(images).permute(0, 3, 1, 2), heads)

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """Return the share by task and their mean as ``"accuracy"``; writes ``samples.png``."""
        self.denoiser.load_state_dict(self.module.average)
        scores = {}
        rows = []

        for task, (images, heads) in self.tasks.items():
            image_embeddings = self.backbone.encode_image(_preprocessed(images, self.backbone))
            noise = torch.randn(len(images), self.steps, 48, 16, 16, generator=torch_rng(0, "watch", task))
            samples = self.denoiser.sample(image_embeddings[:, None], noise, self.steps)
            again = self.backbone.encode_image(_preprocessed(samples, self.backbone))
            alike = (image_embeddings @ heads.T).argmax(1) == (again @ heads.T).argmax(1)
            scores[task] = float(alike.float().mean())
            rows += [images[:16].float() / 255, samples[:16]]

        sheet = torch.cat([torch.cat(list(row), -1) for row in rows], -2)
        image: Image.Image = tvf.to_pil_image(sheet)
        write_atomic(self.folder / "samples.png", lambda path: image.save(path, format="PNG"))

        return {"accuracy": sum(scores.values()) / len(scores), **scores}


class _Ship(Callback):
    """Keeps the running average, and writes the packed weights and the history after every epoch.

    Weights that went on from others are packed mixed with those: what the first training was good at and the second
    did not ask for, such as styles it never saw, mostly stays (Wortsman et al., "Robust fine-tuning of zero-shot
    models", CVPR 2022, section 3).
    """

    def __init__(self, module: DenoisingModule, folder: Path, before: dict[str, Tensor], keep: float) -> None:
        self.module = module
        self.folder = folder
        self.path = folder / "tiny_diffusion.safetensors"
        self.before = before
        self.keep = keep

    def on_step(self, trainer: TrainingView, losses: dict[str, float]) -> None:
        """Move the running average."""
        self.module.update_average()

    def on_epoch(self, trainer: TrainingView, record: dict[str, Any]) -> None:
        """Write both files and one line."""
        write_json(self.folder / "history.json", trainer.progress.history)
        packed = {
            name: tensor.lerp(self.before.get(name, tensor), self.keep).half()
            for name, tensor in self.module.average.items()
        }
        write_tensors(self.path, packed, {"history": trainer.progress.history})
        print(
            " ".join(f"{k} {v:.4g}" for k, v in record.items()),
            f"{trainer.progress.seconds:.0f} s",
            flush=True,
        )
