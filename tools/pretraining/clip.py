"""Pretraining of the embedded ``tiny`` CLIP on captioned scenes, from drawing images to packed weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from pretraining import RECIPES
from pretraining.batches import CaptionBatches
from pretraining.corpus import read_corpus
from pretraining.mixed import Mixed, mixed
from pretraining.objective import ContrastiveModule
from pretraining.watch import ZeroShot
from vlprompt.core.files import write_json, write_tensors
from vlprompt.data.scenes.pairs import CaptionPairs
from vlprompt.training.callbacks import Callback, TrainingView
from vlprompt.training.options import TrainOptions
from vlprompt.training.trainer import Trainer

__all__ = ["PretrainOptions", "pretrain"]

#: Data sets that a run is watched on.
WATCHED = (
    ("colour", "plain"),
    ("shape", "plain"),
    ("pattern", "plain"),
    ("glyph", "plain"),
    ("background", "plain"),
    ("position", "plain"),
    ("count", "plain"),
    ("shape_colour", "plain"),
    ("shape", "inverted"),
    ("shape", "sketch"),
)


class PretrainOptions(BaseModel):
    """Options of :func:`pretrain`; a configuration file holds exactly these."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = "pretrain_tiny"
    images: int = Field(65536, ge=2, description="captioned scenes that are drawn once")
    easy: int = Field(0, ge=0, description="so many of them are easy (one large object, short captions)")
    easy_epochs: int = Field(0, ge=0, description="first epochs, on the easy images alone")
    balanced: bool = Field(
        False, description="more captions about one attribute, rarer attributes more often"
    )
    captions: int = Field(
        8, ge=1, description="captions per image; epoch e reads caption e modulo this number"
    )
    shift: int = Field(2, ge=0, description="images are moved by up to so many pixels each way")
    watch: int = Field(200, ge=1, description="images per data set whose zero-shot accuracy is watched")
    seed: int = Field(1, ge=0, description="seeds scenes, captions and the initial weights")
    train: TrainOptions = TrainOptions()
    precision: Mixed = Field("fp32", description="of the products in train; weights stay float32")


@RECIPES.register(
    "clip",
    summary="the embedded `tiny` on captioned scenes",
    options=PretrainOptions,
    ships="vlprompt/backbones/weights/tiny.safetensors",
)
def pretrain(options: PretrainOptions, folder: Path, *, resume: bool = False, workers: int = 1) -> Path:
    """Run a pretraining from drawing the images to packed weights.

    Args:
        options: What to run.
        folder: Pixels, checkpoint, ``history.json`` and ``tiny.safetensors`` go here.
        resume: Continue from the checkpoint in the folder, if there is one.
        workers: Processes that draw images.

    Returns:
        Path of the packed weights.
    """
    pairs = CaptionPairs(options.images, options.seed, easy=options.easy, balanced=options.balanced)
    corpus = read_corpus(pairs, options.captions, folder / "scenes.u8", workers)
    module = ContrastiveModule(corpus.seen_ids, options.seed)
    curriculum = (options.easy, options.easy_epochs)
    batches = CaptionBatches(corpus, options.train.batch_size, options.train.seed, options.shift, curriculum)
    identity = options.model_dump(mode="json", exclude={"train"})
    ship = _Ship(module, folder)
    validate = ZeroShot(module, WATCHED, options.watch)
    Trainer(mixed(module, options.precision), batches, options.train, folder, validate, [ship], identity).run(
        resume
    )

    return ship.path


class _Ship(Callback):
    """Writes the packed weights and the history after every epoch."""

    def __init__(self, module: ContrastiveModule, folder: Path) -> None:
        self.module = module
        self.folder = folder
        self.path = folder / "tiny.safetensors"

    def on_epoch(self, trainer: TrainingView, record: dict[str, Any]) -> None:
        """Write both files and one line."""
        write_json(self.folder / "history.json", trainer.progress.history)
        write_tensors(self.path, self.module.packed(), {"history": trainer.progress.history})
        print(
            " ".join(f"{k} {v:.4g}" for k, v in record.items()),
            f"{trainer.progress.seconds:.0f} s",
            flush=True,
        )
