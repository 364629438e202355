"""APT: prompts approximated by a term behind attention, so that no token joins the sequence.

Paper: Wu et al., "Approximated Prompt Tuning for Vision-Language Pre-trained Models", arXiv 2306.15706, section 3.3.

Written for ViLT and METER; neither code nor tables of the paper's runs with CLIP are public, so the places, sizes and
training here are ours. With softmax attention over prompts and tokens, per head,

    attention([X; P]) = (1 - l) attention(X) + l attention(P),   l = Z_P / (Z_X + Z_P),

APT takes a read-out through ReLU with shared keys and values for attention(P), a maximum without gradient for l, and a
learned factor for 1 - l. ``kv_prompts`` is the exact left side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from vlprompt.backbones import Backbone
from vlprompt.backbones.edits import BlockEdit
from vlprompt.core.seeding import torch_rng
from vlprompt.core.trainable import ParameterGroup
from vlprompt.learners import LEARNERS
from vlprompt.learners._blocks import AttentionPrompts, Tower, Towers
from vlprompt.learners.base import DEFAULT_TEMPLATES
from vlprompt.learners.recipe import Recipe

__all__ = ["APT", "ApproximatedPrompts", "AttentionTerm"]

Start = Literal["published", "identity"]


@dataclass(frozen=True)
class AttentionTerm:
    """What follows one block's attention: exp(s) (A + g w E), with E = relu(X K^T) P and w each token's largest score.

    Attributes:
        tokens: P, (M, W).
        keys: K, (M, W).
        gain: s, a number; None is 0.
        gate: g, a number; None is 1.
        detach_peak: Whether no gradient flows through w.
    """

    tokens: Tensor
    keys: Tensor
    gain: Tensor | None = None
    gate: Tensor | None = None
    detach_peak: bool = True

    def __call__(self, normed: Tensor, attended: Tensor) -> Tensor:
        """Return (..., W) of the block's normed input X and its attention's output A, both (..., W)."""
        scores = torch.relu(normed.to(self.keys.dtype) @ self.keys.T)  # (..., M)
        peak = scores.amax(-1, keepdim=True)
        read = (peak.detach() if self.detach_peak else peak) * (scores @ self.tokens)

        if self.gate is not None:
            read = self.gate * read
        result = attended + read
        return result if self.gain is None else self.gain.exp() * result


class ApproximatedPrompts(nn.Module):
    """The prompts of J blocks of a tower.

    Args:
        blocks: J.
        width: W of the tower.
        count: M, prompts per block.
        rank: r of what turns prompts into keys.
        has_gain: Whether each block has a factor exp(s), s = 0 at the start.
        has_gate: Whether each block has a gate, 0 at the start.
        generator: Draws P (N(0, 0.02^2)) and the first matrix (N(0, 1)); the second one starts at 0.
    """

    gain: nn.Parameter | None
    gate: nn.Parameter | None

    def __init__(
        self,
        blocks: int,
        width: int,
        count: int,
        rank: int,
        has_gain: bool,
        has_gate: bool,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.tokens = nn.Parameter(0.02 * torch.randn(blocks, count, width, generator=generator))  # P
        self.down = nn.Parameter(torch.randn(blocks, width, rank, generator=generator))
        self.up = nn.Parameter(torch.zeros(blocks, rank, width))
        self.register_parameter("gain", nn.Parameter(torch.zeros(blocks)) if has_gain else None)
        self.register_parameter("gate", nn.Parameter(torch.zeros(blocks)) if has_gate else None)

    def keys(self) -> Tensor:
        """Return K = P + P D U, (J, M, W). With them kept, D and U are needed no more."""
        return self.tokens + (self.tokens @ self.down) @ self.up

    def terms(self, detach_peak: bool = True) -> list[AttentionTerm]:
        """Return what follows the attention of each block."""
        keys = self.keys()
        return [
            AttentionTerm(
                self.tokens[i],
                keys[i],
                None if self.gain is None else self.gain[i],
                None if self.gate is None else self.gate[i],
                detach_peak,
            )
            for i in range(len(keys))
        ]


@LEARNERS.register(
    "apt",
    summary="prompts approximated by a term behind the attention of every block",
    paper="2306.15706",
    needs=("vision",),
)
class APT(AttentionPrompts):
    """M prompts per block that act behind its attention; the sequence of tokens does not grow.

    As published it doesn't start as zero-shot classification: the random prompts say something. ``start=identity``
    adds a gate per block that is closed at first.

    Args:
        backbone: See :class:`Learner`.
        classnames: See :class:`Learner`.
        templates: Sentences whose features make the class weights; the first, where the text tower is prompted.
        towers: Which towers are prompted.
        tokens: M, prompts per block.
        rank: Of what turns prompts into keys.
        blocks: Which blocks, from 0; empty: all.
        start: ``published``, or ``identity``: a learned gate per block, 0 at first.
        gain: Whether attention's output and the term are scaled by a learned factor, 1 at first.
        detach_peak: Whether no gradient flows through the largest score (as published).
        context_length: M of learned context in the sentences (CoOp's); 0: they are hand-written.
        seed: Of all random starts.

    Raises:
        BackboneError: If a tower that is to be prompted has blocks that can't be edited.
        ConfigError: If a block doesn't exist.
        VLPromptError: If a sentence is too long for the text tower; names its class.
    """

    recipe = Recipe(
        {"lr": 1e-3, "optimizer": "adamw", "batch_size": 4, "epochs": 5},  # vpt's, with the authors' AdamW
        factors=(0.1, 1.0, 10.0),
        steps=100,
        trial_steps=30,
    )

    def __init__(
        self,
        backbone: Backbone,
        classnames: Sequence[str],
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        *,
        towers: Towers = "image",
        tokens: Annotated[int, Field(ge=1, le=1024)] = 16,
        rank: Annotated[int, Field(ge=1)] = 4,
        blocks: Sequence[Annotated[int, Field(ge=0)]] = (),
        start: Start = "published",
        gain: bool = True,
        detach_peak: bool = True,
        context_length: Annotated[int, Field(ge=0, le=64)] = 0,
        seed: int = 1,
    ) -> None:
        super().__init__(backbone, classnames, templates)
        self._begin(towers, blocks, context_length, seed)
        self.detach_peak = detach_peak

        def prompts(tower: Tower, width: int) -> ApproximatedPrompts:
            generator = torch_rng(seed, "apt", tower)
            count = len(self.places[tower])
            return ApproximatedPrompts(count, width, tokens, rank, gain, start == "identity", generator)

        widths: dict[Tower, int] = {"image": backbone.vision.width, "text": backbone.text.width}
        self.prompts = nn.ModuleDict({tower: prompts(tower, widths[tower]) for tower in self.places})

    def edits(self, tower: Tower) -> list[BlockEdit]:
        """See :meth:`AttentionPrompts.edits`."""
        prompts = self.prompts[tower]
        assert isinstance(prompts, ApproximatedPrompts)
        return [BlockEdit(after_attention=term) for term in prompts.terms(self.detach_peak)]

    def parameter_groups(self) -> list[ParameterGroup]:
        """See :meth:`Hooks.parameter_groups`: gains and gates learn at a tenth of the rate, without decay."""
        names = list(self.learned_parameters())
        numbers = [name for name in names if name.endswith((".gain", ".gate"))]
        if not numbers:
            return []
        rest = [name for name in names if name not in numbers]
        return [{"names": rest}, {"names": numbers, "rate": 0.1, "weight_decay": 0.0}]
