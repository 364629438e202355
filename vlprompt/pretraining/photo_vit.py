"""Distils the last convolution of ``photo`` into the transformer of ``photo-vit``, on unlabelled photographs.

The frozen network's maps of composed pictures are computed once and kept. The network's last convolution sees each place
by itself, so maps can be flipped and put together from parts of several, and what the teacher says of the result is
computed exactly. Three losses: the cosine of the picture's embedding to the teacher's, that of every place's, and the
divergence between their opinions about the 1,000 rows.
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
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.fusion import fuse_conv_bn_weights

from vlprompt.backbones.lite0 import MAP_CHANNELS, PIXELS, STRIDE, Lite0Stem, class_rows, load_lite0
from vlprompt.backbones.photo_weights import PHOTO, build_vit_model, load_vit, pack_vit
from vlprompt.files import read_tensors, write_tensors
from vlprompt.pretraining import RECIPES
from vlprompt.pretraining.photo_scale import calibrate
from vlprompt.pretraining.photo_text import SayEpochs
from vlprompt.pretraining.photographs import COMPOSITION, Photographs, cached_maps, composed, whole
from vlprompt.seeding import derive_seed, numpy_rng, seeded_modules
from vlprompt.training.batches import Batch, epoch_plan
from vlprompt.training.options import TrainOptions
from vlprompt.training.trainer import Trainer

__all__ = ["DistilModule", "MapBatches", "PhotoVitOptions", "Teacher", "pretrain_vit"]

_SCALE = 20.0  # on cosines, before the softmax over rows
_COSINE = 5.0  # weight of the cosine losses beside the divergence
_SIDE = PIXELS // STRIDE
_GAIN = 8.0  # of the teacher's answer over the map it is added to, at the start


class PhotoVitOptions(BaseModel):
    """Options of :func:`pretrain_vit`; a configuration file holds exactly these."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = "pretrain_photo_vit"
    photos: Path = Field(description="folder of photographs: one tar or folder per WordNet id")
    classes_kept_back: int = Field(30, ge=0, description="classes whose photographs are never read in training")
    pictures: int = Field(8000, ge=2, description="composed pictures whose maps are computed once")
    mix: float = Field(0.5, ge=0, le=1, description="share of maps that get a part of another one")
    watch: int = Field(250, ge=1, description="photographs each, of seen and unseen classes, that are watched")
    words: Path = Field(PHOTO, description="what photo-text made; default: the package's")
    seed: int = Field(1, ge=0, description="seeds compositions, what is kept back, and the initial weights")
    train: TrainOptions = TrainOptions()


class Teacher(nn.Module):
    """What ``photo`` says of (B, 49, 320) maps.

    Args:
        lite0: The network.
        projection: (1280, d) of ``photo``.
        mean: (1280,) of ``photo``.
    """

    def __init__(self, lite0: Any, projection: Tensor, mean: Tensor) -> None:
        super().__init__()
        norm = lite0.bn2
        weight, bias = fuse_conv_bn_weights(
            lite0.conv_head.weight, None, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        self.weight, self.bias = weight.detach().flatten(1), bias.detach()
        self.projection, self.mean = projection.float(), mean.float()

    @torch.no_grad()
    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Return unit embeddings of the pictures (B, d) and of their places (B, 49, d)."""
        features = F.linear(maps, self.weight, self.bias).clamp(0, 6)
        pooled = (features.mean(1) - self.mean) @ self.projection
        return F.normalize(pooled, dim=-1), F.normalize((features - self.mean) @ self.projection, dim=-1)


class MapBatches:
    """Batches of maps, flipped and mixed.

    Args:
        maps: (N, 49, 320).
        batch_size: Maps per batch.
        seed: The run's seed.
        mix: Share of maps that get a rectangle of another one of the batch.
    """

    def __init__(self, maps: NDArray[Any], batch_size: int, seed: int, mix: float) -> None:
        self.maps, self.batch_size, self.seed, self.mix = maps, batch_size, seed, mix

    def plan(self, epoch: int) -> list[NDArray[np.int64]]:
        """See :meth:`vlprompt.training.batches.Batches.plan`."""
        return epoch_plan(len(self.maps), self.batch_size, self.seed, epoch)

    def fetch(self, indices: NDArray[np.int64], epoch: int) -> Batch:
        """See :meth:`vlprompt.training.batches.Batches.fetch`."""
        rng = numpy_rng(self.seed, "maps", epoch, derive_seed(0, *indices.tolist()))
        maps = np.stack([self.maps[i] for i in indices]).astype(np.float32).reshape(-1, _SIDE, _SIDE, MAP_CHANNELS)
        flip = rng.random(len(maps)) < 0.5
        maps[flip] = maps[flip][:, :, ::-1]
        others = np.roll(maps, 1, 0)
        for i in np.flatnonzero(rng.random(len(maps)) < self.mix):
            (top, bottom), (left, right) = (np.sort(rng.integers(0, _SIDE + 1, 2)) for _ in range(2))
            maps[i, top:bottom, left:right] = others[i, top:bottom, left:right]
        return {"map": torch.from_numpy(maps).flatten(1, 2)}


class DistilModule(nn.Module):
    """The transformer, which learns, and its teacher, which doesn't.

    Args:
        visual: open_clip's VisionTransformer; what is in the place of its patch embedding is not used.
        teacher: See :class:`Teacher`.
        rows: (1000, d) unit rows.
    """

    def __init__(self, visual: Any, teacher: Teacher, rows: Tensor) -> None:
        super().__init__()
        self.visual = visual
        self.visual.conv1 = nn.Identity()
        self.frozen = [teacher, rows]  # in a list: no part of what is trained and saved

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return the three losses of a batch of :class:`MapBatches`."""
        teacher, rows = self.frozen
        with sdpa_kernel(SDPBackend.MATH):  # faster than the fused one for 50 tokens on a CPU
            picture, places = self.embed(batch["map"])
        true, true_places = teacher(batch["map"])
        picture, places = picture.float(), places.float()
        guess = (_SCALE * picture @ rows.T).log_softmax(-1)
        target = (_SCALE * true @ rows.T).log_softmax(-1)
        return {
            "cosine": _COSINE * (1 - (picture * true).sum(-1)).mean(),
            "places": _COSINE * (1 - (places * true_places).sum(-1)).mean(),
            "rows": F.kl_div(guess, target, log_target=True, reduction="batchmean"),
        }

    def embed(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Return unit embeddings of pictures (B, d) and of places (B, 49, d) from (B, 49, 320) maps."""
        visual = self.visual
        x = torch.cat([visual.class_embedding.expand(len(maps), 1, -1), maps], dim=1)
        x = visual.transformer(visual.ln_pre(x + visual.positional_embedding))[:, 1:]
        picture, places = visual.ln_post(x.mean(1)) @ visual.proj, visual.ln_post(x) @ visual.proj
        return F.normalize(picture, dim=-1), F.normalize(places, dim=-1)

    @torch.no_grad()
    def start_from_teacher(self) -> None:
        """Let the last block's MLP begin as the teacher's convolution; its hidden layer is just as wide."""
        teacher: Any = self.frozen[0]
        mlp, width = self.visual.transformer.resblocks[-1].mlp, teacher.weight.shape[1]
        mlp.c_fc.weight.copy_(teacher.weight)
        mlp.c_fc.bias.copy_(teacher.bias)
        directions = teacher.projection[:, :width]
        mlp.c_proj.weight.copy_(_GAIN * directions.T)
        mlp.c_proj.bias.copy_(-_GAIN * teacher.mean @ directions)
        self.visual.proj.zero_()
        self.visual.proj[:, :width].fill_diagonal_(1.0)

    def trainable_state(self) -> dict[str, Tensor]:
        """Return every parameter of the transformer by name."""
        return {n: t.detach() for n, t in self.visual.state_dict().items()}

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Put parameters back, strictly."""
        self.visual.load_state_dict(dict(state), strict=True)


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
        found: dict[str, float] = {}
        for name, maps in self.maps.items():
            picture, (true, _) = self.module.embed(maps)[0], teacher(maps)
            same = (picture @ rows.T).argmax(1) == (true @ rows.T).argmax(1)
            found[f"{name}/agreement"] = float(same.float().mean())
            found[f"{name}/cosine"] = float((picture * true).sum(-1).mean())
        agreements = [v for k, v in found.items() if k.endswith("agreement")]
        return {"accuracy": sum(agreements) / len(agreements), **found}


def training_maps(options: PhotoVitOptions, photographs: Photographs, stem: nn.Module, folder: Path) -> NDArray[Any]:
    """Return the maps of composed training pictures."""
    pool = photographs.chosen("train")
    key = derive_seed(options.seed, "maps", options.pictures, len(pool), photographs.unseen, COMPOSITION)
    return cached_maps(
        lambda n: composed(photographs, pool, n, options.seed), options.pictures, stem, folder / f"train-{key:x}.f16"
    )


def watched_maps(
    options: PhotoVitOptions, photographs: Photographs, stem: nn.Module, folder: Path
) -> dict[str, NDArray[Any]]:
    """Return the maps of photographs that are kept back, of seen (``val``) and unseen classes."""
    found = {}
    for part in ("val", "unseen"):
        pool = photographs.chosen(part)
        if not pool:
            continue
        order = numpy_rng(options.seed, "watched", part).permutation(len(pool))[: options.watch]
        key = derive_seed(options.seed, part, options.watch, len(pool), photographs.unseen)

        def picture(n: int, pool: list[tuple[str, int]] = pool, order: NDArray[Any] = order) -> NDArray[np.uint8]:
            return whole(photographs.read(*pool[order[n]]))

        found[part] = cached_maps(picture, len(order), stem, folder / f"{part}-{key:x}.f16")
    return found


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
    module.start_from_teacher()
    batches = MapBatches(maps, options.train.batch_size, options.train.seed, options.mix)
    identity = options.model_dump(mode="json", exclude={"train", "photos", "words", "watch"})
    watch = Watch(module, watched)
    progress = Trainer(module, batches, options.train, folder, watch, [SayEpochs(folder)], identity).run(resume)
    return _ship(options, folder, module, progress.history)


def _ship(options: PhotoVitOptions, folder: Path, module: DistilModule, history: list[dict[str, Any]]) -> Path:
    model: Any = build_vit_model(load_lite0())
    model.visual.load_state_dict(module.trainable_state(), strict=False)
    path = folder / "photo_vit.safetensors"
    write_tensors(path, pack_vit(model))
    load_vit(model, path, options.words)
    found = calibrate(model, options.photos, options.classes_kept_back, options.seed)
    model.logit_scale.data.fill_(float(np.log(found["scale"])))
    about = {"pictures_composed": options.pictures, "distilled": history[-1] if history else {}, **found}
    write_tensors(path, pack_vit(model), {"facts": about, "history": history})
    return path
