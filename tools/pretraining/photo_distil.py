"""What ``photo-vit`` is distilled from and how: maps of photographs, the teacher on them, and the losses.

The network's last convolution sees each place by itself, so maps can be flipped and put together from parts of several,
and what the teacher says of the result is computed exactly. Three losses: the cosine of the image's embedding to the
teacher's, that of every place's, and the divergence between their opinions about the 1,000 rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.fusion import fuse_conv_bn_weights

from vlprompt.backbones.lite0 import MAP_CHANNELS, PIXELS, STRIDE
from vlprompt.core.seeding import derive_seed, numpy_rng
from vlprompt.core.trainable import Trainable
from vlprompt.training.batches import Batch, epoch_plan

__all__ = ["DistilModule", "MapBatches", "Teacher"]

_SCALE = 20.0  # on cosines, before the softmax over rows
_COSINE = 5.0  # weight of the cosine losses beside the divergence
_SIDE = PIXELS // STRIDE
_GAIN, _RIDGE = (
    16.0,
    1e-3,
)  # at the start: of the teacher's answer over the map it is added to; of the regression


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
            lite0.conv_head.weight,
            None,
            norm.running_mean,
            norm.running_var,
            norm.eps,
            norm.weight,
            norm.bias,
        )
        self.weight = weight.detach().flatten(1)
        self.bias = bias.detach()
        self.projection = projection.float()
        self.mean = mean.float()

    @torch.no_grad()
    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Return unit embeddings of the images (B, d) and of their places (B, 49, d)."""
        features = self.places(maps)
        pooled = features.mean(1) @ self.projection
        return F.normalize(pooled, dim=-1), F.normalize(features @ self.projection, dim=-1)

    def places(self, maps: Tensor) -> Tensor:
        """Return (B, 49, 1280) features of places, around their mean."""
        return F.linear(maps, self.weight, self.bias).clamp(0, 6) - self.mean


class MapBatches:
    """Batches of maps, flipped and mixed.

    Args:
        maps: (N, 49, 320).
        batch_size: Maps per batch.
        seed: The run's seed.
        mix: Share of maps that get a rectangle of another one of the batch.
    """

    def __init__(self, maps: NDArray[Any], batch_size: int, seed: int, mix: float) -> None:
        self.maps = maps
        self.batch_size = batch_size
        self.seed = seed
        self.mix = mix

    def plan(self, epoch: int) -> list[NDArray[np.int64]]:
        """See :meth:`vlprompt.training.batches.Batches.plan`."""
        return epoch_plan(len(self.maps), self.batch_size, self.seed, epoch)

    def fetch(self, indices: NDArray[np.int64], epoch: int) -> Batch:
        """See :meth:`vlprompt.training.batches.Batches.fetch`."""
        rng = numpy_rng(self.seed, "maps", epoch, derive_seed(0, *indices.tolist()))
        maps = (
            np.stack([self.maps[i] for i in indices])
            .astype(np.float32)
            .reshape(-1, _SIDE, _SIDE, MAP_CHANNELS)
        )
        flip = rng.random(len(maps)) < 0.5
        maps[flip] = maps[flip][:, :, ::-1]
        others = np.roll(maps, 1, 0)

        for i in np.flatnonzero(rng.random(len(maps)) < self.mix):
            (top, bottom), (left, right) = (np.sort(rng.integers(0, _SIDE + 1, 2)) for _ in range(2))
            maps[i, top:bottom, left:right] = others[i, top:bottom, left:right]

        return {"map": torch.from_numpy(maps).flatten(1, 2)}


class DistilModule(nn.Module, Trainable):
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
        self.frozen: list[Any] = [teacher, rows]  # in a list: no part of what is trained and saved

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return the three losses of a batch of :class:`MapBatches`."""
        teacher, rows = self.frozen
        with sdpa_kernel(SDPBackend.MATH):  # faster than the fused one for 50 tokens on a CPU
            image, places = self.embed(batch["map"])

        true, true_places = teacher(batch["map"])
        image = image.float()
        places = places.float()
        guess = (_SCALE * image @ rows.T).log_softmax(-1)
        target = (_SCALE * true @ rows.T).log_softmax(-1)

        return {
            "cosine": _COSINE * (1 - (image * true).sum(-1)).mean(),
            "places": _COSINE * (1 - (places * true_places).sum(-1)).mean(),
            "rows": F.kl_div(guess, target, log_target=True, reduction="batchmean"),
        }

    def embed(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Return unit embeddings of images (B, d) and of places (B, 49, d) from (B, 49, 320) maps."""
        visual = self.visual
        x = self.states(maps)
        image = visual.ln_post(x.mean(1)) @ visual.proj
        places = visual.ln_post(x) @ visual.proj
        return F.normalize(image, dim=-1), F.normalize(places, dim=-1)

    def states(self, maps: Tensor) -> Tensor:
        """Return (B, 49, W) states of places after the last block."""
        visual = self.visual
        x = torch.cat([visual.class_embedding.expand(len(maps), 1, -1), maps], dim=1)
        return visual.transformer(visual.ln_pre(x + visual.positional_embedding))[:, 1:]

    @torch.no_grad()
    def start_from_teacher(self, maps: Tensor) -> None:
        """Let the last block's MLP begin as the teacher's convolution; its hidden layer is just as wide.

        The layer before the activation is the teacher's own, scaled to what the norm does to a map; the one after it
        is the ridge regression from the hidden layer to what the teacher says of the places.

        Args:
            maps: (B, 49, 320) a few hundred, for the regression.
        """
        visual = self.visual
        teacher = self.frozen[0]
        mlp = visual.transformer.resblocks[-1].mlp
        width = teacher.weight.shape[1]
        mlp.c_fc.weight.copy_(teacher.weight * float(maps.std()))
        mlp.c_fc.bias.copy_(teacher.bias)
        mlp.c_proj.weight.zero_(), mlp.c_proj.bias.zero_()
        hidden: list[Tensor] = []
        handle = mlp.c_proj.register_forward_hook(lambda _, inputs, output: hidden.append(inputs[0][:, 1:]))
        residual = self.states(maps)
        handle.remove()
        h = F.pad(hidden[0].flatten(0, 1).double(), (0, 1), value=1.0)
        target = teacher.places(maps) @ teacher.projection[:, :width]
        target = (_GAIN * target - residual).flatten(0, 1).double()
        ridge = h.T @ h + _RIDGE * len(h) * torch.eye(h.shape[1], dtype=h.dtype)
        solution = torch.linalg.solve(ridge, h.T @ target).float()
        mlp.c_proj.weight.copy_(solution[:-1].T)
        mlp.c_proj.bias.copy_(solution[-1])
        visual.proj.zero_()
        visual.proj[:, :width].fill_diagonal_(1.0)

    def trainable_state(self) -> dict[str, Tensor]:
        """Return every parameter of the transformer by name."""
        return {n: t.detach() for n, t in self.visual.state_dict().items()}

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Put parameters back, strictly."""
        self.visual.load_state_dict(dict(state), strict=True)
