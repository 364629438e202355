"""Key/value prompts: deep prompts that attention reads and that ask nothing.

Deep prompts (Jia et al., ECCV 2022, arXiv 2203.12119, section 3) whose own queries, outputs and MLPs are left out, so
that their keys and values are projected once for all images; or prefix tuning (Li and Liang, ACL 2021, arXiv
2101.00190, section 4), where keys and values are learned themselves. The exact neighbour of ``apt`` at equal length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from vlprompt.backbones import Backbone
from vlprompt.backbones.attention import keys_values_of
from vlprompt.backbones.edits import BlockEdit, KeysValues
from vlprompt.core.seeding import torch_rng
from vlprompt.learners import LEARNERS
from vlprompt.learners._blocks import AttentionPrompts, Tower, Towers
from vlprompt.learners._visual import initial_visual_prompts
from vlprompt.learners.base import DEFAULT_TEMPLATES
from vlprompt.learners.recipe import Recipe

__all__ = ["KeyValuePrompts"]


@LEARNERS.register(
    "kv_prompts",
    summary="learned keys and values that every block's attention reads",
    paper="2101.00190",
    needs=("vision",),
)
class KeyValuePrompts(AttentionPrompts):
    """M prompts per block in front of its keys and values; the sequence of tokens does not grow.

    In the text tower every token sees them, from the first on.

    Args:
        backbone: See :class:`Learner`.
        classnames: See :class:`Learner`.
        templates: Sentences whose features make the class weights; the first, where the text tower is prompted.
        towers: Which towers are prompted.
        tokens: M, prompts per block.
        learn: ``tokens``, of which each block's own weights make keys and values, as they do of deep prompts; or
            ``keys``: keys and values themselves, twice as many numbers.
        blocks: Which blocks, from 0; empty: all.
        context_length: M of learned context in the sentences (CoOp's); 0: they are hand-written.
        seed: Of all random starts.

    Raises:
        BackboneError: If a tower that is to be prompted has blocks that can't be edited.
        ConfigError: If a block doesn't exist.
        VLPromptError: If a sentence is too long for the text tower; names its class.
    """

    recipe = Recipe({"lr": 0.0025, "batch_size": 4, "epochs": 5}, steps=100, trial_steps=30)

    def __init__(
        self,
        backbone: Backbone,
        classnames: Sequence[str],
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        *,
        towers: Towers = "image",
        tokens: Annotated[int, Field(ge=1, le=1024)] = 16,
        learn: Literal["tokens", "keys"] = "tokens",
        blocks: Sequence[Annotated[int, Field(ge=0)]] = (),
        context_length: Annotated[int, Field(ge=0, le=64)] = 0,
        seed: int = 1,
    ) -> None:
        super().__init__(backbone, classnames, templates)
        self._begin(towers, blocks, context_length, seed)

        # Per tower (J, M, W): the tokens, or the keys and the values.
        self.tokens = nn.ParameterDict()
        self.values = nn.ParameterDict()
        for tower, places in self.places.items():
            start = self._start(tower, len(places), tokens, seed)
            self.tokens[tower] = nn.Parameter(start)
            if learn == "keys":
                pairs = [self._of_tokens(tower, place, start[i]) for i, place in enumerate(places)]
                self.tokens[tower] = nn.Parameter(torch.stack([pair.keys for pair in pairs]).float())
                self.values[tower] = nn.Parameter(torch.stack([pair.values for pair in pairs]).float())

    def edits(self, tower: Tower) -> list[BlockEdit]:
        """See :meth:`AttentionPrompts.edits`."""
        tokens = self.tokens[tower]
        if tower in self.values:
            pairs = [KeysValues(key, value) for key, value in zip(tokens, self.values[tower], strict=True)]
        else:
            pairs = [self._of_tokens(tower, place, tokens[i]) for i, place in enumerate(self.places[tower])]
        return [BlockEdit(keys_values=pair) for pair in pairs]

    def _of_tokens(self, tower: Tower, place: int, tokens: Tensor) -> KeysValues:
        """Return what a block's own weights make of (M, W) tokens."""
        blocks = self.backbone.vision.blocks if tower == "image" else self.backbone.text.blocks
        return keys_values_of(blocks[place], tokens)

    def _start(self, tower: Tower, blocks: int, count: int, seed: int) -> Tensor:
        """Return (J, M, W) tokens: VPT's start for images, N(0, 0.02^2) for sentences."""
        if tower == "image":
            return initial_visual_prompts(self.backbone.vision, blocks, count, seed=seed)
        shape = (blocks, count, self.backbone.text.width)
        return 0.02 * torch.randn(shape, generator=torch_rng(seed, "kv_prompts", "text"))
