"""Learners whose prompts act inside the attention of one tower or both, where the sequence of tokens stays as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from vlprompt.backbones import Backbone
from vlprompt.backbones.edits import BlockEdit
from vlprompt.backbones.layout import PromptLayout
from vlprompt.backbones.vision import Images
from vlprompt.core.errors import BackboneError, ConfigError
from vlprompt.learners._context import context_layout, initial_context
from vlprompt.learners._visual import ComputedOnce

__all__ = ["AttentionPrompts", "Tower", "Towers"]

Tower = Literal["image", "text"]
Towers = Literal["image", "text", "both"]


class AttentionPrompts(ComputedOnce):
    """Base of learners that edit the attention of chosen blocks.

    A method calls :meth:`_begin`, makes its parameters, and defines :meth:`edits`. Sentences are hand-written, or have
    CoOp's learned context beside the prompts.

    Attributes:
        places: Tower to the numbers of its edited blocks, from 0, ascending; towers that are left alone are missing.
        layout: The sentences; None where the text side is zero-shot classification's.
        context: (M, Dt) learned context of the sentences, or None.
    """

    places: dict[Tower, tuple[int, ...]]
    layout: PromptLayout | None
    context: nn.Parameter | None

    def edits(self, tower: Tower) -> Sequence[BlockEdit]:
        """Return the edits of a tower's chosen blocks, in their order."""
        raise NotImplementedError

    def class_embeddings(self) -> Tensor:
        """See :meth:`Learner.class_embeddings`."""
        if self.layout is None:
            return self.get_buffer("zero_shot")
        adapters = self._adapters("text") if "text" in self.places else None
        return self.backbone.text.encode(self.layout, self.context, adapters=adapters)

    def frozen_stages(self) -> int:
        """See :meth:`Learner.frozen_stages`: the stem, and the blocks below the first edited one."""
        return 1 + self.places["image"][0] if "image" in self.places else 0

    def embed_images(self, images: Images) -> Tensor:
        """See :meth:`Learner.embed_images`."""
        if "image" not in self.places:
            return self.backbone.image_embeddings(images)
        return self.backbone.image_embeddings(images, adapters=self._once("image", self._image_adapters))

    def _begin(self, towers: Towers, blocks: Sequence[int], context_length: int, seed: int) -> None:
        """Find the places, and make the sentences with their context.

        Args:
            towers: Which towers are edited.
            blocks: Numbers of the blocks, from 0; empty: all.
            context_length: M of the learned context; 0: the sentences are hand-written.
            seed: Of the context's start.

        Raises:
            BackboneError: If a tower can't be edited.
            ConfigError: If a block does not exist.
        """
        backbone = self.backbone
        self.places = {}
        if towers != "text":
            _require_edits(backbone)
            self.places["image"] = _chosen(blocks, backbone.vision.layers, "image", self.title())
        if towers != "image":
            backbone.text.require_edits()
            self.places["text"] = _chosen(blocks, backbone.text.layers, "text", self.title())
        self.static_images = "image" not in self.places

        self.layout = None
        self.register_parameter("context", None)
        if context_length:
            self.context = nn.Parameter(initial_context(backbone.text, context_length, seed=seed))
            self.layout = context_layout(backbone.text, self.classnames, context_length)
        elif "text" in self.places:
            sentences = [backbone.text.sentence(self.templates[0].format(name)) for name in self.classnames]
            self.layout = backbone.text.layout(sentences, self.classnames)
        else:
            weights = backbone.class_weights(self.classnames, self.templates)
            self.register_buffer("zero_shot", weights, persistent=False)

    def _image_adapters(self) -> list[BlockEdit | None]:
        return self._adapters("image")

    def _adapters(self, tower: Tower) -> list[BlockEdit | None]:
        """Return one entry per block of a tower."""
        layers = self.backbone.vision.layers if tower == "image" else self.backbone.text.layers
        adapters: list[BlockEdit | None] = [None] * layers
        for place, edit in zip(self.places[tower], self.edits(tower), strict=True):
            adapters[place] = edit
        return adapters


def _require_edits(backbone: Backbone) -> None:
    """Raise BackboneError with the reason if the image tower can't be prompted; the text tower alone may be."""
    try:
        backbone.vision.require_attention_edits()
    except BackboneError as error:
        raise BackboneError(f"{error} Or prompt the text tower alone: towers=text.") from error


def _chosen(blocks: Sequence[int], layers: int, tower: Tower, learner: str) -> tuple[int, ...]:
    """Return which blocks of a tower are edited."""
    outside = [block for block in blocks if block >= layers]
    if outside:
        raise ConfigError(
            [f"blocks: the {tower} tower has blocks 0 to {layers - 1}, got {outside[0]}."],
            f"learner {learner!r}",
        )
    return tuple(sorted(set(blocks))) or tuple(range(layers))
