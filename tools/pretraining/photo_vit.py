"""Distils the last convolution of ``photo`` into the transformer of ``photo-vit``, on unlabelled photographs.

The frozen network's maps of composed images are computed once and kept; see :mod:`pretraining.photo_distil`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from pretraining import RECIPES
from pretraining.mixed import Mixed, mixed
from pretraining.photo_distil import DistilModule, MapBatches, Teacher
from pretraining.photo_scale import calibrate
from pretraining.photo_text import SayEpochs
from pretraining.photographs import COMPOSITION, Photographs, cached_maps, composed, whole
from vlprompt.backbones.lite0 import Lite0Stem, class_rows, load_lite0
from vlprompt.backbones.photo_weights import PHOTO, build_vit_model, load_vit, pack_vit
from vlprompt.core.files import read_tensors, write_tensors
from vlprompt.core.seeding import derive_seed, numpy_rng, seeded_modules
from vlprompt.training.options import TrainOptions
from vlprompt.training.trainer import Trainer

__all__ = ["PhotoVitOptions", "pretrain_vit", "training_maps"]

_START = 400  # maps that the transformer's first state is fitted to


class PhotoVitOptions(BaseModel):
    """Options of :func:`pretrain_vit`; a configuration file holds exactly these."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = "pretrain_photo_vit"
    photos: Path = Field(description="folder of photographs: one tar or folder per WordNet id")
    classes_kept_back: int = Field(
        30, ge=0, description="classes whose photographs are never read in training"
    )
    images: int = Field(4000, ge=2, description="composed images whose maps are computed once")
    mix: float = Field(0.5, ge=0, le=1, description="share of maps that get a part of another one")
    watch: int = Field(
        250, ge=1, description="photographs each, of seen and unseen classes, that are watched"
    )
    words: Path = Field(PHOTO, description="what photo-text made; default: the package's")
    seed: int = Field(1, ge=0, description="seeds compositions, what is kept back, and the initial weights")
    train: TrainOptions = TrainOptions()
    precision: Mixed = Field("fp32", description="of the products in train; weights stay float32")


class Watch:
    """How often the transformer's nearest row is the teacher's, and how near their embeddings are.

    Args:
        module: What is trained.
        maps: Maps of whole photographs by name.
    """

    def __init__(self, module: DistilModule, maps: Mapping[str, NDArray[Any]]) -> None:
        self.module = module
        self.maps = {name: torch.from_numpy(np.array(m, np.float32)) for name, m in maps.items()}

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """Return ``agreement`` and ``cosine`` by name, and their mean agreement as ``accuracy``."""
        teacher, rows = self.module.frozen
        figures: dict[str, float] = {}

        for name, maps in self.maps.items():
            image = self.module.embed(maps)[0]
            (true, _) = teacher(maps)
            same = (image @ rows.T).argmax(1) == (true @ rows.T).argmax(1)
            figures[f"{name}/agreement"] = float(same.float().mean())
            figures[f"{name}/cosine"] = float((image * true).sum(-1).mean())

        agreements = [v for k, v in figures.items() if k.endswith("agreement")]
        return {"accuracy": sum(agreements) / len(agreements), **figures}


def training_maps(
    options: PhotoVitOptions, photographs: Photographs, stem: nn.Module, folder: Path
) -> NDArray[Any]:
    """Return the maps of composed training images."""
    pool = photographs.chosen("train")
    key = derive_seed(options.seed, "maps", options.images, len(pool), photographs.unseen, COMPOSITION)
    return cached_maps(
        lambda n: composed(photographs, pool, n, options.seed),
        options.images,
        stem,
        folder / f"train-{key:x}.f16",
    )


def watched_maps(
    options: PhotoVitOptions, photographs: Photographs, stem: nn.Module, folder: Path
) -> dict[str, NDArray[Any]]:
    """Return the maps of photographs that are kept back, of seen (``val``) and unseen classes."""
    maps_by_part = {}
    for part in ("val", "unseen"):
        pool = photographs.chosen(part)
        if not pool:
            continue
        order = numpy_rng(options.seed, "watched", part).permutation(len(pool))[: options.watch]
        key = derive_seed(options.seed, part, options.watch, len(pool), photographs.unseen)

        def image(
            n: int, pool: list[tuple[str, int]] = pool, order: NDArray[Any] = order
        ) -> NDArray[np.uint8]:
            return whole(photographs.read(*pool[order[n]]))

        maps_by_part[part] = cached_maps(image, len(order), stem, folder / f"{part}-{key:x}.f16")
    return maps_by_part


@RECIPES.register(
    "photo-vit",
    summary="the transformer of `photo-vit`, distilled from `photo` on photographs without labels",
    options=PhotoVitOptions,
    ships="vlprompt/backbones/weights/photo_vit.safetensors",
)
def pretrain_vit(options: PhotoVitOptions, folder: Path, *, resume: bool = False, workers: int = 1) -> Path:
    """Compute maps, train the transformer, calibrate its scale, and pack.

    Args:
        options: What to run.
        folder: Maps, checkpoint, ``history.json`` and ``photo_vit.safetensors`` go here.
        resume: Continue from the checkpoint in the folder, if there is one.
        workers: Not used.

    Returns:
        Path of the packed weights.
    """
    lite0 = load_lite0()
    photographs = Photographs(options.photos, options.classes_kept_back, options.seed)
    words = read_tensors(options.words)[0]
    projection = words["visual.projection"].float()
    teacher = Teacher(lite0, projection, words["visual.mean"])
    rows = F.normalize(class_rows(lite0) @ projection, dim=-1)
    stem = Lite0Stem(lite0)
    maps = training_maps(options, photographs, stem, folder)
    watched = watched_maps(options, photographs, stem, folder)

    with seeded_modules(options.seed, "photo-vit", "initialisation"):
        module = DistilModule(build_vit_model(lite0).visual, teacher, rows)

    module.start_from_teacher(torch.from_numpy(np.array(maps[:_START], np.float32)))
    batches = MapBatches(maps, options.train.batch_size, options.train.seed, options.mix)
    identity = options.model_dump(mode="json", exclude={"train", "photos", "words", "watch"})
    watch = Watch(module, watched)
    progress = Trainer(
        mixed(module, options.precision), batches, options.train, folder, watch, [SayEpochs(folder)], identity
    ).run(resume)

    return _ship(options, folder, module, progress.history)


def _ship(
    options: PhotoVitOptions, folder: Path, module: DistilModule, history: list[dict[str, Any]]
) -> Path:
    model: Any = build_vit_model(load_lite0())
    model.visual.load_state_dict(module.trainable_state(), strict=False)
    path = folder / "photo_vit.safetensors"
    write_tensors(path, pack_vit(model))
    load_vit(model, path, options.words)
    calibration = calibrate(model, options.photos, options.classes_kept_back, options.seed)
    model.logit_scale.data.fill_(float(np.log(calibration["scale"])))
    about = {"pictures_composed": options.images, "distilled": history[-1] if history else {}, **calibration}
    write_tensors(path, pack_vit(model), {"facts": about, "history": history})

    return path
