"""Pretraining of the embedded segmenters' decoders on phrases and masks of drawn scenes.

The towers are the embedded ``tiny``'s, frozen: what they say of the images is computed once and kept on disk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from pretraining import RECIPES
from pretraining.phrases import PhraseScenes
from vlprompt.backbones import Backbone, create_backbone
from vlprompt.core.files import write_json, write_tensors
from vlprompt.core.seeding import derive_seed
from vlprompt.core.trainable import Trainable
from vlprompt.data.scenes.attributes import HELD_OUT_MASKS
from vlprompt.data.scenes.pairs import MaskedScenes
from vlprompt.data.scenes.tasks import GENERATOR
from vlprompt.segmentation import Segmenter, create_segmenter
from vlprompt.training.batches import Batch, epoch_plan
from vlprompt.training.callbacks import Callback, TrainingView
from vlprompt.training.options import TrainOptions
from vlprompt.training.trainer import Trainer

__all__ = ["MaskBatches", "MaskModule", "MaskOptions", "ShipDecoder", "dice", "normalised", "pretrain_masks"]

_CHUNK = 256  # images whose states are computed together


class MaskOptions(BaseModel):
    """Options of :func:`pretrain_masks`; a configuration file holds exactly these."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = "pretrain_clipseg_tiny"
    segmenter: Literal["clipseg", "cris"] = "clipseg"
    decoder: dict[str, Any] = Field(default_factory=dict, description="options of the segmenter: its sizes")
    images: int = Field(16384, ge=1, description="scenes that are drawn once")
    negatives: float = Field(0.1, ge=0, lt=1, description="share of phrases that name nothing")
    watch: int = Field(200, ge=1, description="images per data set whose Dice is watched")
    seed: int = Field(1, ge=0, description="seeds scenes, phrases and the initial weights")
    train: TrainOptions = TrainOptions()


@RECIPES.register(
    "masks",
    summary="decoders of the embedded segmenters on phrases and masks of scenes",
    options=MaskOptions,
    ships="vlprompt/segmentation/weights/",
)
def pretrain_masks(options: MaskOptions, folder: Path, *, resume: bool = False, workers: int = 1) -> Path:
    """Train a decoder from drawing the images to packed weights.

    Args:
        options: What to run.
        folder: States, checkpoint, ``history.json`` and ``<segmenter>_tiny.safetensors`` go here.
        resume: Continue from the checkpoint in the folder, if there is one.
        workers: Not used: one process draws and encodes.

    Returns:
        Path of the packed weights.
    """
    segmenter = create_segmenter(
        options.segmenter,
        create_backbone("tiny"),
        "decoder",
        weights="random",
        seed=options.seed,
        **options.decoder,
    )
    scenes = PhraseScenes(options.images, options.seed, options.negatives)
    module = MaskModule(segmenter)
    batches = MaskBatches(scenes, segmenter, folder, options.train)
    ship = ShipDecoder(module, folder / f"{options.segmenter}_tiny.safetensors")
    identity = options.model_dump(mode="json", exclude={"train"})
    Trainer(module, batches, options.train, folder, _Watch(segmenter, options.watch), [ship], identity).run(
        resume
    )

    return ship.path


class MaskModule(nn.Module, Trainable):
    """A segmenter whose decoder, batch statistics included, is trained from scratch."""

    def __init__(self, segmenter: Segmenter) -> None:
        super().__init__()
        self.segmenter = segmenter

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return cross entropy over pixels and one minus Dice per image.

        Args:
            batch: ``frozen/<name>`` states, ``texts`` (B strings) and ``mask`` (B, 1, H, W) in {0, 1}.
        """
        frozen = {n.removeprefix("frozen/"): t.float() for n, t in batch.items() if n.startswith("frozen/")}
        mask = batch["mask"].float()
        logits = self.segmenter.decode(frozen, batch["texts"], (mask.shape[2], mask.shape[3]))
        probability = logits.sigmoid().flatten(1)
        target = mask.flatten(1)
        overlap = (2 * (probability * target).sum(1) + 1) / (probability.sum(1) + target.sum(1) + 1)

        return {"bce": F.binary_cross_entropy_with_logits(logits, mask), "dice": 0.5 * (1 - overlap).mean()}

    def train(self, mode: bool = True) -> MaskModule:
        """Let batch statistics move, which a segmenter by itself doesn't."""
        super().train(mode)
        self.segmenter.decoder.train(mode)
        return self

    def trainable_state(self) -> dict[str, Tensor]:
        """Return the decoder's parameters and running statistics."""
        return {n: t.detach() for n, t in self.segmenter.decoder.state_dict().items()}

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Put them back, strictly."""
        self.segmenter.decoder.load_state_dict(dict(state), strict=True)


class MaskBatches:
    """Batches of frozen states, phrases and masks; epoch e reads phrase e of every scene.

    Args:
        scenes: The scenes.
        segmenter: Whose frozen states are kept; float16 in ``folder``, reused if they are there.
        folder: See above.
        options: Batch size and seed.
    """

    def __init__(
        self, scenes: PhraseScenes, segmenter: Segmenter, folder: Path, options: TrainOptions
    ) -> None:
        self.scenes = scenes
        self.batch_size = options.batch_size
        self.seed = options.seed
        key = derive_seed(
            scenes.seed,
            GENERATOR,
            len(scenes),
            segmenter.method,
            segmenter.options,
            segmenter.backbone.fingerprint,
        )
        self.states, self.masks = _states(scenes, segmenter, folder / f"states-{key:x}")

    def plan(self, epoch: int) -> list[NDArray[np.int64]]:
        """See :meth:`vlprompt.training.batches.Batches.plan`."""
        return epoch_plan(len(self.scenes), self.batch_size, self.seed, epoch)

    def fetch(self, indices: NDArray[np.int64], epoch: int) -> Batch:
        """See :meth:`vlprompt.training.batches.Batches.fetch`; the batch is what the module's loss reads."""
        texts = []
        masks = []

        for index in indices:
            text, named = self.scenes.phrase(int(index), epoch)
            objects = np.unpackbits(self.masks[index], axis=2).astype(bool)
            texts.append(text)
            masks.append(objects[named].any(0) if named else np.zeros_like(objects[0]))

        order = np.argsort(indices)  # a disk is read in one direction
        back = np.argsort(order)
        states = {
            f"frozen/{n}": torch.from_numpy(np.ascontiguousarray(s[indices[order]][back]))
            for n, s in self.states.items()
        }
        return {**states, "texts": texts, "mask": torch.from_numpy(np.stack(masks))[:, None]}


def _states(
    scenes: PhraseScenes, segmenter: Segmenter, folder: Path
) -> tuple[dict[str, NDArray[np.float16]], NDArray[np.uint8]]:
    """Draw and encode all scenes, or find them done; arrays are memory-mapped."""
    done = folder / "masks.npy"
    if not done.is_file():  # written last
        folder.mkdir(parents=True, exist_ok=True)
        masks = []
        maps = {}

        for start in range(0, len(scenes), _CHUNK):
            scenes_drawn = [scenes.rendered(i) for i in range(start, min(start + _CHUNK, len(scenes)))]
            masks += [m for _, m in scenes_drawn]

            pixels = normalised(segmenter.backbone, np.stack([image for image, _ in scenes_drawn]))
            for name, state in segmenter.frozen(pixels).items():
                if name not in maps:
                    shape = (len(scenes), *state.shape[1:])
                    maps[name] = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float16, shape)
                maps[name][start : start + len(state)] = state.half().numpy()

        for array in maps.values():
            array.flush()

        np.save(done.with_suffix(".part.npy"), np.stack(masks))
        done.with_suffix(".part.npy").replace(done)

    states = {
        p.stem: np.load(p, mmap_mode="r")
        for p in sorted(folder.glob("*.npy"))
        if not p.stem.startswith("masks")
    }
    return states, np.load(done, mmap_mode="r")


def normalised(backbone: Backbone, images: NDArray[np.uint8]) -> Tensor:
    """Return (N, 3, H, W) normalised pixels of (N, H, W, 3) images that have the backbone's size already."""
    facts = backbone.fingerprint["preprocess"]
    mean, std = (torch.tensor(facts[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / std


class _Watch:
    """Mean Dice per image on scenes like the training's, in held-out styles, and of held-out objects."""

    def __init__(self, segmenter: Segmenter, images: int) -> None:
        self.segmenter = segmenter
        self.sets = {}

        for style in ("plain", "sketch", "inverted"):
            scenes = MaskedScenes(10 * images, 0, "watch", style)
            training_indices = [
                i for i in range(len(scenes)) if scenes.spec(i).objects[0].shape not in HELD_OUT_MASKS
            ]
            self.sets[style] = self._read(scenes, training_indices[:images])

            if style == "plain":
                other = sorted(set(range(len(scenes))) - set(training_indices))
                self.sets["objects"] = self._read(scenes, other[:images])

    def _read(self, scenes: MaskedScenes, chosen: list[int]) -> tuple[Tensor, list[str], Tensor]:
        items = [scenes[i] for i in chosen]
        pixels = normalised(self.segmenter.backbone, np.stack([np.asarray(x.image) for x in items]))
        return pixels, [x.phrase for x in items], torch.from_numpy(np.stack([x.mask for x in items]))

    def __call__(self) -> dict[str, float]:
        """Return Dice by data set."""
        figures = {}
        for name, (pixels, texts, masks) in self.sets.items():
            guess = self.segmenter(pixels, texts)[:, 0] > 0
            figures[f"dice_{name}"] = float(dice(guess, masks).mean())

        return figures


def dice(guess: Tensor, masks: Tensor) -> Tensor:
    """Return (B,) Dice of (B, H, W) bool."""
    both = (guess & masks).sum((1, 2))
    either = guess.sum((1, 2)) + masks.sum((1, 2))
    return 2 * both / either.clamp(min=1)


class ShipDecoder(Callback):
    """Writes the packed weights and the history after every epoch.

    Args:
        module: What is trained.
        path: Of the weights.
        words: Phrases that it is trained on.
        pixels: Side of the images it is used on, where that is not the backbone's.
    """

    def __init__(
        self, module: MaskModule, path: Path, words: Sequence[str] = (), pixels: int | None = None
    ) -> None:
        self.module = module
        self.path = path
        self.words = {"words": sorted(words)} if words else {}
        self.pixels = {"pixels": pixels} if pixels else {}

    def on_epoch(self, trainer: TrainingView, record: dict[str, Any]) -> None:
        """Write both files and one line."""
        segmenter: Any = self.module.segmenter
        write_json(self.path.parent / "history.json", trainer.progress.history)
        state = {
            n: t.half() if t.is_floating_point() else t for n, t in self.module.trainable_state().items()
        }
        facts = {
            "sizes": {**segmenter.sizes, **self.pixels},
            "backbone": segmenter.backbone.fingerprint["weights"],
        }
        write_tensors(self.path, state, {**facts, **self.words, "history": trainer.progress.history})
        print(
            " ".join(f"{k} {v:.4g}" for k, v in record.items()),
            f"{trainer.progress.seconds:.0f} s",
            flush=True,
        )
