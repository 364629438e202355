"""Pieces of learners that prompt both towers: sentences that start from a phrase, and the mixer of UPT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlprompt.backbones import Backbone
from vlprompt.backbones.layout import PromptLayout, slot
from vlprompt.backbones.text import TextTower
from vlprompt.backbones.vision import VisualPrompts
from vlprompt.core.errors import DataError
from vlprompt.core.seeding import seeded_modules, torch_rng
from vlprompt.learners._context import NO_ATTRIBUTES, Attributes, initial_context
from vlprompt.learners._offsets import OffsetOptions, OffsetSentences
from vlprompt.learners._visual import PromptedImages, initial_visual_prompts, possible_depth

__all__ = [
    "DualPrompts",
    "Mixing",
    "PromptMixer",
    "initial_deep_context",
    "phrase_context",
]

Mixing = Literal["transformer", "tokenwise", "mlp", "identity"]


def phrase_context(
    tower: TextTower,
    classnames: Sequence[str],
    length: int,
    init: str = "",
    seed: int = 1,
    attributes: Attributes = NO_ATTRIBUTES,
) -> tuple[Tensor, PromptLayout]:
    """Return learned context in front of the class name, and the sentences it stands in.

    With a phrase, its first ``length`` tokens are learned and the rest stays as written: "a photo of a" with
    two gives [v1 v2 of a <name>.] (MaPLe, Khattak et al. 2023, section 4.1; PromptSRC).

    Args:
        tower: The text tower.
        classnames: C names.
        length: M, number of learned tokens.
        init: The phrase; empty: ``length`` vectors from N(0, 0.02^2) and nothing else before the name.
        seed: Of the random start.
        attributes: What stands in front of the sentence.

    Returns:
        (M, Dt) float32 start values, then those of the attributes, and the layout.

    Raises:
        BackboneError: If learned context can't enter this tower.
        DataError: If the phrase has fewer than ``length`` tokens.
        VLPromptError: If a class name is too long beside the context; names it.
    """
    start = initial_context(tower, length, init, seed)
    rest: list[int] = []  # tokens of the phrase that stay as written

    if init:
        if len(start) < length:
            raise DataError(
                f"init={init!r} has {len(start)} tokens, fewer than context_length={length}. Give a longer phrase, "
                "fewer tokens, or init='' for a random start."
            )
        start = start[:length]
        rest = tower.require_tokenizer().encode(init.replace("_", " "))[length:]

    slots = [slot(k) for k in range(length)]
    front = attributes.pieces(tower, length)
    sentences = [tower.sentence(*front, *slots, *rest, f"{name}.") for name in classnames]
    return attributes.joined(start, seed), tower.layout(sentences, classnames)


def initial_deep_context(tower: TextTower, depth: int, length: int, seed: int = 1) -> Tensor:
    """Return (J - 1, M, Dt) start values, N(0, 0.02^2), of what replaces the context before blocks 1 .. J - 1."""
    generator = torch_rng(seed, "deep context")
    return 0.02 * torch.randn(depth - 1, length, tower.width, generator=generator)


class PromptMixer(nn.Module):
    """The joint transform of text and visual prompts (UPT: Zang et al. 2022, arXiv 2210.07225, section 3.2).

    Both are brought to one width, laid side by side (text first), mixed, split and brought back. Form and sizes
    follow MVLPT (Shen et al., arXiv 2211.11720), UPT's only public implementation, except for its swapped axes.

    Args:
        text_width: Dt.
        visual_width: W.
        width: The common width; a side that has it already needs no projection.
        kind: ``"transformer"``: one pre-norm block with one head; ``"tokenwise"``: the same block, but each prompt
            attends to itself alone, which is what MVLPT's code computes (it swaps the axes of tokens and batch);
            ``"mlp"``: only GELU between the projections; ``"identity"``: nothing, prompts pass unchanged.
        residual: Add the prompts as they came in, so that a phrase they started from survives the random
            projections; off in MVLPT.
        seed: Of the initial values.
    """

    def __init__(
        self,
        text_width: int,
        visual_width: int,
        *,
        width: int = 128,
        kind: Mixing = "transformer",
        residual: bool = False,
        seed: int = 1,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.residual = residual
        if kind == "identity":
            return

        with seeded_modules(seed, "prompt mixer"):
            self.text_in, self.text_out = _there_and_back(text_width, width)
            self.visual_in, self.visual_out = _there_and_back(visual_width, width)

            self.block: nn.Module = nn.GELU()
            if kind in ("transformer", "tokenwise"):
                self.block = nn.TransformerEncoderLayer(
                    width,
                    1,
                    4 * width,
                    dropout=0.0,
                    activation=_quick_gelu,
                    batch_first=True,
                    norm_first=True,
                )

    def forward(self, text: Tensor, visual: Tensor) -> tuple[Tensor, Tensor]:
        """Mix (K, Dt) text prompts and (J, M, W) visual prompts; return both in the shapes they came in."""
        if self.kind == "identity":
            return text, visual

        together = torch.cat([self.text_in(text), self.visual_in(visual.flatten(0, 1))])
        # Along axis 1 every prompt is a sequence of one token, which attends to itself alone.
        batch_axis = 1 if self.kind == "tokenwise" else 0
        mixed = self.block(together.unsqueeze(batch_axis)).squeeze(batch_axis)
        new_text = self.text_out(mixed[: len(text)])
        new_visual = self.visual_out(mixed[len(text) :]).view_as(visual)

        if self.residual:
            return text + new_text, visual + new_visual
        return new_text, new_visual


def _there_and_back(outer: int, inner: int) -> tuple[nn.Module, nn.Module]:
    if outer == inner:
        return nn.Identity(), nn.Identity()
    return nn.Linear(outer, inner), nn.Linear(inner, outer)


def _quick_gelu(x: Tensor) -> Tensor:
    return F.silu(1.702 * x) / 1.702


class DualPrompts(OffsetSentences, PromptedImages):
    """Base of learners with independent deep prompts in both towers; visual ones are appended.

    Args:
        backbone: See :class:`Learner`.
        classnames: See :class:`Learner`.
        templates: See :class:`Learner`.
        context_length: M of the text tower.
        visual_length: M of the image tower.
        text_depth: Prompted layers of the text tower, at most all it has.
        visual_depth: Prompted layers of the image tower, at most all it has.
        init: See :func:`phrase_context`.
        attributes: See :class:`Attributes`.
        attribute_length: Learned vectors in front of each attribute word.
        offsets: See :class:`OffsetOptions`.
        seed: Of all random starts.
    """

    deep_context: nn.Parameter | None
    learns_texts = True

    def __init__(
        self,
        backbone: Backbone,
        classnames: Sequence[str],
        templates: Sequence[str],
        *,
        context_length: int,
        visual_length: int,
        text_depth: int,
        visual_depth: int,
        init: str,
        attributes: Sequence[str] = (),
        attribute_length: int = 2,
        offsets: OffsetOptions,
        seed: int,
    ) -> None:
        super().__init__(backbone, classnames, templates)
        text = backbone.text
        vision = backbone.vision
        text.require_prompts()
        vision.require_prompts()

        words = Attributes(attributes, attribute_length)
        start, self.layout = phrase_context(text, self.classnames, context_length, init, seed, words)
        self._begin_offsets(offsets, seed)
        self.context = nn.Parameter(start)  # (M, Dt), then those of the attributes
        depth = possible_depth(text_depth, text.layers)
        deep = nn.Parameter(initial_deep_context(text, depth, context_length, seed))  # (J - 1, M, Dt)
        self.register_parameter("deep_context", deep if depth > 1 else None)

        depth = possible_depth(visual_depth, vision.layers)
        self.visual = nn.Parameter(initial_visual_prompts(vision, depth, visual_length, "append", seed))

    def visual_prompts(self) -> VisualPrompts:
        """See :meth:`PromptedImages.visual_prompts`."""
        return VisualPrompts(self.visual, "append")

    def class_embeddings(self) -> Tensor:
        """See :meth:`Learner.class_embeddings`."""
        return self._encode(self.context, self.deep_context)
