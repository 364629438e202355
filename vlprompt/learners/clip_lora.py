"""CLIP-LoRA: low-rank updates of the attention of both towers.

Paper: Zanella and Ben Ayed, "Low-Rank Few-Shot Adaptation of Vision-Language Models", CVPR workshops 2024,
    arXiv 2405.18541, section 3; LoRA: Hu et al., arXiv 2106.09685.

The published code scales the update by alpha / sqrt(rank), the papers write alpha / rank: ``scaling`` chooses.
Its path without dropout takes the update off the weight before the backward pass reads it, so gradients of all
but the last blocks are those of other weights; here they are exact with and without dropout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from vlprompt.backbones import Backbone
from vlprompt.backbones.attention import Projections
from vlprompt.backbones.layout import PromptLayout
from vlprompt.backbones.vision import Images
from vlprompt.core.seeding import torch_rng
from vlprompt.learners import LEARNERS
from vlprompt.learners.base import DEFAULT_TEMPLATES, Learner
from vlprompt.learners.recipe import Recipe

__all__ = ["ClipLora", "LowRank"]

Matrix = Literal["q", "k", "v"]
Layers = Literal["all", "bottom", "mid", "up", "half-bottom", "half-up", "top1", "top2", "top3"]
# First and last block as fractions of the depth: thirds and halves, as the published code has for 12 blocks.
_PARTS = {
    "all": (0.0, 1.0),
    "bottom": (0.0, 1 / 3),
    "mid": (1 / 3, 2 / 3),
    "up": (2 / 3, 1.0),
    "half-bottom": (0.0, 0.5),
    "half-up": (0.5, 1.0),
}


class LowRank(nn.Module):
    """The update of one block's queries, keys and values, an adapter of the towers.

    Each of the chosen matrices M gets s B_M A_M dropout(x), with a mask of its own in training; all in float32.

    Args:
        width: W of what the attention reads.
        sizes: Widths of queries, keys and values: 3 times W in most towers.
        matrices: Which of q, k and v.
        rank: Of the update.
        scale: s.
        dropout: Share of the input's values that are dropped in training.
        generator: Draws A (Kaiming uniform, as linear layers start); B starts at zero.
    """

    def __init__(
        self,
        width: int,
        sizes: Sequence[int],
        matrices: Sequence[Matrix],
        rank: int,
        scale: float,
        dropout: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.sizes: dict[str, int] = dict(zip("qkv", sizes, strict=True))
        self.matrices = tuple(matrices)
        self.scale = scale
        self.dropout = dropout

        bound = width**-0.5
        start = {m: torch.empty(rank, width).uniform_(-bound, bound, generator=generator) for m in matrices}
        self.down = nn.ParameterDict(start)  # A: (r, W)
        self.up = nn.ParameterDict({m: torch.zeros(self.sizes[m], rank) for m in matrices})  # B: (W, r)

    def forward(self, x: Tensor) -> Tensor:
        """Return what is added to the projected queries, keys and values of (..., W), one after the other."""
        x = x.to(
            self.down[self.matrices[0]].dtype
        )  # a tower may compute in half precision, what is learned doesn't
        return torch.cat([self._part(m, x) for m in "qkv"], dim=-1)

    def _part(self, matrix: str, x: Tensor) -> Tensor:
        """Return the update of one of q, k and v; zero if it has none."""
        if matrix not in self.matrices:
            return x.new_zeros(*x.shape[:-1], self.sizes[matrix])
        inner = F.linear(F.dropout(x, self.dropout, self.training), self.down[matrix])
        return F.linear(self.scale * inner, self.up[matrix])

    @torch.no_grad()
    def weight_update(self) -> Tensor:
        """Return the change of the packed projection's weight (3 W, W) that does the same, dropout aside."""
        first = self.down[self.matrices[0]]
        parts = []
        for m in "qkv":
            zero = first.new_zeros(self.sizes[m], first.shape[1])
            parts.append(self.scale * self.up[m] @ self.down[m] if m in self.matrices else zero)
        return torch.cat(parts)


@LEARNERS.register(
    "clip_lora",
    summary="low-rank updates of attention in both towers",
    paper="2405.18541",
    needs=("attention",),
)
class ClipLora(Learner):
    """Queries, keys and values of every block get a low-rank update; the frozen towers themselves stay untouched.

    The update starts at zero, so the learner starts as zero-shot classification. While dropout acts, the text
    tower shares nothing between sentences: each draws its own masks, as if it were run by itself.

    Args:
        backbone: See :class:`Learner`.
        classnames: See :class:`Learner`.
        templates: The first makes the sentences, as in the published code (all, if the text tower is left alone).
        encoder: Which towers are updated.
        matrices: Which projections are updated.
        layers: Which blocks: thirds from below (bottom, mid, up), halves, the last ones, or all.
        rank: Of the updates.
        alpha: Numerator of the scale.
        scaling: ``sqrt_rank``: alpha / sqrt(rank) (the published code and figures); ``rank``: alpha / rank.
        dropout: Share of the update's input values that are dropped in training.
        seed: Of the random start.

    Raises:
        BackboneError: If a tower that is to be updated has no layers that project queries, keys and values.
        VLPromptError: If a sentence is too long for the text tower; names its class.
    """

    recipe = Recipe(
        {
            "lr": 2e-4,
            "batch_size": 32,
            "optimizer": "adamw",
            "weight_decay": 0.01,
            "schedule": "cosine",
            "warmup_epochs": 0.0,
            "drop_last": False,
        },
        steps_per_shot=500,
        steps=100,
        trial_steps=30,
    )

    def __init__(
        self,
        backbone: Backbone,
        classnames: Sequence[str],
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        *,
        encoder: Literal["both", "text", "vision"] = "both",
        matrices: Annotated[tuple[Matrix, ...], Field(min_length=1, max_length=3)] = ("q", "k", "v"),
        layers: Layers = "all",
        rank: Annotated[int, Field(ge=1)] = 2,
        alpha: Annotated[float, Field(gt=0)] = 1.0,
        scaling: Literal["sqrt_rank", "rank"] = "sqrt_rank",
        dropout: Annotated[float, Field(ge=0, lt=1)] = 0.25,
        seed: int = 1,
    ) -> None:
        super().__init__(backbone, classnames, templates)
        scale = alpha / (math.sqrt(rank) if scaling == "sqrt_rank" else rank)
        self.text = nn.ModuleDict()
        self.vision = nn.ModuleDict()
        self.static_images = encoder == "text"
        self.learns_texts = encoder != "vision"

        def updates(tower: str, places: Sequence[Projections]) -> nn.ModuleDict:
            """Build the updates of a tower's chosen blocks."""
            generator = torch_rng(seed, "lora", tower)
            modules = {}
            for block in _chosen(layers, len(places)):
                width, sizes = places[block].width, places[block].sizes
                modules[str(block)] = LowRank(width, sizes, matrices, rank, scale, dropout, generator)
            return nn.ModuleDict(modules)

        if encoder != "vision":
            backbone.text.require_adapters()
            self.text = updates("text", backbone.text.attention)
            self.layout = self._lay_out()
            self.noisy_layout = self._lay_out(share_prefix=False) if dropout else self.layout

        if encoder != "text":
            backbone.vision.require_adapters()
            self.vision = updates("vision", backbone.vision.attention)

        if encoder == "vision":
            weights = backbone.class_weights(self.classnames, self.templates)
            self.register_buffer("zero_shot", weights, persistent=False)

    def class_embeddings(self) -> Tensor:
        """See :meth:`Learner.class_embeddings`."""
        if not self.text:
            return self.get_buffer("zero_shot")

        layout = self.noisy_layout if self.training else self.layout
        adapters = _by_block(self.text, len(self.backbone.text.attention))
        return self.backbone.text.encode(layout, adapters=adapters)

    def frozen_stages(self) -> int:
        """See :meth:`Learner.frozen_stages`: the stem, and the blocks below the first update."""
        tower = self.backbone.vision
        if not self.vision or not tower.layers:  # a tower without blocks is not taken apart
            return 0
        return 1 + min(int(block) for block in self.vision)

    def embed_images(self, images: Images) -> Tensor:
        """See :meth:`Learner.embed_images`."""
        if not self.vision:
            return self.backbone.image_embeddings(images)

        adapters = _by_block(self.vision, len(self.backbone.vision.attention))
        return self.backbone.image_embeddings(images, adapters=adapters)

    def _lay_out(self, share_prefix: bool = True) -> PromptLayout:
        """Return the sentences of all classes; a tower that isn't causal never shares a prefix."""
        tower = self.backbone.text
        sentences = [tower.sentence(self.templates[0].format(name)) for name in self.classnames]
        return tower.layout(sentences, self.classnames, share_prefix)


def _by_block(updates: nn.ModuleDict, depth: int) -> list[nn.Module | None]:
    """Return one entry per block of a tower: its update, or None."""
    adapters: list[nn.Module | None] = [None] * depth
    for index, update in updates.items():
        adapters[int(index)] = update
    return adapters


def _chosen(layers: Layers, depth: int) -> range:
    """Return the numbers of the blocks that get an update."""
    if layers.startswith("top"):
        return range(max(0, depth - int(layers[3:])), depth)

    first, last = _PARTS[layers]
    return range(round(first * depth), round(last * depth))
