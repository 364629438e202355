"""Pretraining of `photo-vit`'s decoders on drawn views of the world, and on what its own patches are like.

Two kinds of phrases are asked of each view. Words for what is drawn have the drawing's mask. Names of ImageNet's
classes have the patches that are likest them as a rough mask, by the towers alone: so that a phrase that no view
shows is answered by likeness too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from pretraining import RECIPES
from pretraining.masks import MaskModule, ShipDecoder, dice, normalised
from pretraining.views import WORDS, drawn_view
from vlprompt.backbones import create_backbone
from vlprompt.backbones.taps import dense_embeddings
from vlprompt.core.seeding import derive_seed, numpy_rng
from vlprompt.segmentation import Segmenter, create_segmenter
from vlprompt.training.batches import Batch, epoch_plan
from vlprompt.training.options import TrainOptions
from vlprompt.training.trainer import Trainer

__all__ = ["MOST_THINGS", "PhotoMaskOptions", "ViewBatches", "pretrain_photo_masks"]

_CHUNK = 25  # views whose states are computed together
_SENTENCES = ("{}", "{}", "{}.", "a {}", "the {}", "a photo of a {}.", "a photo of the {}.")
#: Things of a view whose masks are kept; one beyond them may be asked for as if the view did not show it.
MOST_THINGS = 12
_LIKE = 0.7  # deviations above the mean from which a patch counts as like an ImageNet name
_NAMES = 3  # ImageNet names that a view is asked for
_ABOUT = ("things", "masks", "likest", "rough")  # arrays that are no states of the image tower


class PhotoMaskOptions(BaseModel):
    """Options of :func:`pretrain_photo_masks`; a configuration file holds exactly these."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = "pretrain_clipseg_photo"
    segmenter: Literal["clipseg", "cris"] = "clipseg"
    decoder: dict[str, Any] = Field(default_factory=dict, description="options of the segmenter: its sizes")
    views: int = Field(3000, ge=1, description="views that are drawn once")
    side: int = Field(224, ge=64, le=512, multiple_of=32, description="of a view in pixels")
    pixels: int = Field(320, ge=64, description="side of the images that the decoder is used on")
    absent: float = Field(
        0.1, ge=0, lt=1, description="share of phrases that name what the view doesn't show"
    )
    names: float = Field(
        0.15, ge=0, lt=1, description="share of phrases that are names of ImageNet's classes"
    )
    watch: int = Field(100, ge=1, description="views, drawn by another seed, whose Dice is watched")
    seed: int = Field(1, ge=0, description="seeds views, phrases and the initial weights")
    train: TrainOptions = TrainOptions()


@RECIPES.register(
    "photo-masks",
    summary="decoders of clipseg and cris on `photo-vit`, on drawn views",
    options=PhotoMaskOptions,
    ships="vlprompt/segmentation/weights/",
)
def pretrain_photo_masks(
    options: PhotoMaskOptions, folder: Path, *, resume: bool = False, workers: int = 1
) -> Path:
    """Draw and encode the views, train the decoder, and pack it.

    Args:
        options: What to run.
        folder: States, checkpoint, ``history.json`` and ``<segmenter>_photo_vit.safetensors`` go here.
        resume: Continue from the checkpoint in the folder, if there is one.
        workers: Not used.

    Returns:
        Path of the packed weights.
    """
    segmenter = create_segmenter(
        options.segmenter,
        create_backbone("photo-vit"),
        "decoder",
        weights="random",
        seed=options.seed,
        **options.decoder,
    )
    module = MaskModule(segmenter)
    batches = ViewBatches(segmenter, options, folder)
    words = [word for calls in WORDS.values() for word in calls]
    ship = ShipDecoder(module, folder / f"{options.segmenter}_photo_vit.safetensors", words, options.pixels)
    identity = options.model_dump(mode="json", exclude={"train", "watch"})
    watch = _watch(segmenter, options.watch, options.side)
    Trainer(module, batches, options.train, folder, watch, [ship], identity).run(resume)

    return ship.path


class ViewBatches:
    """Batches of frozen states, phrases and masks; epoch e asks for phrase e of every view.

    Args:
        segmenter: Whose frozen states are kept; float16 in ``folder``, reused if they are there.
        options: What is drawn and asked.
        folder: See above.
    """

    def __init__(self, segmenter: Segmenter, options: PhotoMaskOptions, folder: Path) -> None:
        self.options = options
        self.batch_size = options.train.batch_size
        names = list(WORDS)
        self.words = names
        self.classes = list(open_clip.IMAGENET_CLASSNAMES)

        key = derive_seed(
            options.seed,
            options.views,
            options.side,
            names,
            segmenter.method,
            segmenter.options,
            segmenter.backbone.fingerprint["id"],
        )
        self.arrays = _encoded(segmenter, options, self.classes, names, folder / f"views-{key:x}")

    def plan(self, epoch: int) -> list[NDArray[np.int64]]:
        """See :meth:`vlprompt.training.batches.Batches.plan`."""
        return epoch_plan(self.options.views, self.batch_size, self.options.seed, epoch)

    def fetch(self, indices: NDArray[np.int64], epoch: int) -> Batch:
        """See :meth:`vlprompt.training.batches.Batches.fetch`; the batch is what the module's loss reads."""
        asked = [self.phrase(int(index), epoch) for index in indices]
        texts = [text for text, _ in asked]
        masks = torch.from_numpy(np.stack([mask for _, mask in asked]))[:, None]
        states = {
            f"frozen/{name}": torch.from_numpy(np.stack([array[i] for i in indices]))
            for name, array in self.arrays.items()
            if name not in _ABOUT
        }
        return {**states, "texts": texts, "mask": masks}

    def phrase(self, index: int, draw: int) -> tuple[str, NDArray[np.bool_]]:
        """Return a phrase about a view and its (H, W) mask; draws differ."""
        rng = numpy_rng(self.options.seed, "views", "phrase", index, draw)
        shown = [int(number) for number in self.arrays["things"][index] if number >= 0]
        packed = self.arrays["masks"][index]
        side = packed.shape[1]
        sentence = _SENTENCES[int(rng.integers(len(_SENTENCES)))]
        kind = rng.random()

        if kind < self.options.names or not shown:
            which = int(rng.integers(_NAMES))
            rough = self.arrays["rough"][index, which].astype(np.float32)
            scores = torch.from_numpy(rough)[None, None]
            blown = F.interpolate(scores, (side, side), mode="bilinear", align_corners=False)[0, 0]
            return sentence.format(self.classes[self.arrays["likest"][index, which]]), (blown > _LIKE).numpy()

        if kind < self.options.names + self.options.absent:
            others = [number for number in range(len(self.words)) if number not in shown]
            name = self.words[others[int(rng.integers(len(others)))]]
            mask = np.zeros((side, side), bool)
        else:
            place = int(rng.integers(len(shown)))
            name = self.words[shown[place]]
            mask = np.unpackbits(packed[place], axis=1).astype(bool)

        calls = WORDS[name]
        word = calls[0] if rng.random() < 0.5 else calls[int(rng.integers(len(calls)))]
        return sentence.format(word), mask


def _encoded(
    segmenter: Segmenter, options: PhotoMaskOptions, classes: list[str], names: list[str], folder: Path
) -> dict[str, NDArray[Any]]:
    """Draw and encode all views, or find them done; arrays are memory-mapped.

    Returns the frozen states, ``masks`` and ``things`` of each view, and of its ``likest`` ImageNet names the ``rough``
    maps of likeness.
    """
    done = folder / "done"
    if not done.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        rows = segmenter.backbone.class_weights(classes, ["a photo of a {}."])
        arrays: dict[str, NDArray[Any]] = {}

        for start in range(0, options.views, _CHUNK):
            numbers = range(start, min(start + _CHUNK, options.views))
            part = _chunk(segmenter, options, numbers, rows, names)
            for name, values in part.items():
                if name not in arrays:
                    shape = (options.views, *values.shape[1:])
                    arrays[name] = np.lib.format.open_memmap(
                        folder / f"{name}.npy", "w+", values.dtype, shape
                    )
                arrays[name][start : numbers.stop] = values

        for array in arrays.values():
            array.flush()  # type: ignore[attr-defined]
        done.touch()

    return {path.stem: np.load(path, mmap_mode="r") for path in sorted(folder.glob("*.npy"))}


@torch.no_grad()
def _chunk(
    segmenter: Segmenter, options: PhotoMaskOptions, numbers: range, rows: Tensor, names: list[str]
) -> dict[str, NDArray[Any]]:
    """Return the arrays of some views, see :func:`_encoded`."""
    side = options.side
    views = [drawn_view(options.seed, number, side) for number in numbers]
    things = np.full((len(views), MOST_THINGS), -1, np.int16)
    masks = np.zeros((len(views), MOST_THINGS, side, side // 8), np.uint8)

    for i, view in enumerate(views):
        order = numpy_rng(options.seed, "views", "kept", numbers[i]).permutation(sorted(view.masks))
        for place, name in enumerate(order[:MOST_THINGS]):
            things[i, place] = names.index(name)
            masks[i, place] = np.packbits(view.masks[name], axis=1)

    frozen = segmenter.frozen(normalised(segmenter.backbone, np.stack([view.image for view in views])))
    states = {name: state.half().numpy() for name, state in frozen.items()}

    grid = side // segmenter.backbone.vision.stream.patch[0]  # type: ignore[union-attr]
    deepest = frozen[max(name for name in frozen if name.startswith("tap"))]
    scores = dense_embeddings(segmenter.backbone.vision, deepest, grid * grid) @ rows.T  # (B, N, 1000)
    likest = (scores.amax(1) - scores.mean(1)).topk(_NAMES, dim=1).indices
    rough = torch.gather(scores, 2, likest[:, None].expand(-1, grid * grid, -1)).transpose(1, 2)
    rough = (rough - rough.mean(2, keepdim=True)) / (rough.std(2, keepdim=True) + 1e-6)

    return {
        **states,
        "things": things,
        "masks": masks,
        "likest": likest.numpy().astype(np.int16),
        "rough": rough.unflatten(2, (grid, grid)).half().numpy(),
    }


def _watch(segmenter: Segmenter, views: int, side: int) -> Callable[[], Mapping[str, float]]:
    """Return what measures the mean Dice of the largest thing of views that are not trained on."""
    drawn = [drawn_view(0, number, side) for number in range(views)]
    drawn = [view for view in drawn if view.masks]
    named = [max(view.masks, key=lambda name, view=view: view.masks[name].sum()) for view in drawn]  # type: ignore[misc]
    smaller = [min(view.masks, key=lambda name, view=view: view.masks[name].sum()) for view in drawn]  # type: ignore[misc]
    pixels = normalised(segmenter.backbone, np.stack([view.image for view in drawn]))

    def measure() -> dict[str, float]:
        figures = {}
        for kind, names in (("largest", named), ("smallest", smaller)):
            masks = torch.from_numpy(np.stack([v.masks[n] for v, n in zip(drawn, names, strict=True)]))
            guess = torch.cat(
                [
                    segmenter(pixels[i : i + _CHUNK], [WORDS[n][0] for n in names[i : i + _CHUNK]])[:, 0] > 0
                    for i in range(0, len(pixels), _CHUNK)
                ]
            )
            figures[f"dice_{kind}"] = float(dice(guess, masks).mean())
        return figures

    return measure
