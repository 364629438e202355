"""The base of every strategy: parameters, and how they become prompts for the towers of a segmentation model.

Depth J means J rows of prompts: row 0 enters with the embeddings, row i replaces the prompts' states before block i
(counted from 0), in both towers and in every model. All rows are computed once per step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from vlprompt.backbones import Backbone
from vlprompt.core.errors import DataError, VLPromptError
from vlprompt.core.seeding import torch_rng

__all__ = ["Rows", "Strategy", "checked_depth", "random_rows", "text_rows"]


@dataclass(frozen=True)
class Rows:
    """Prompts of one step.

    Attributes:
        text: (J, M, Dt), or one set per image (B, J, M, Dt); None without text prompts.
        vision: (J, M, Dv); None without visual prompts.
    """

    text: Tensor | None = None
    vision: Tensor | None = None


class Strategy(nn.Module):
    """Base of all strategies. Keyword-only constructor arguments are its options.

    Args:
        backbone: The towers, for their widths and depths; not kept.

    Attributes:
        tunes: What learns: ``"prompts"`` (and a new last layer, if the model has one), ``"decoder"``, ``"all"`` or
            ``"nothing"``.
        prompts_text: Whether prompts enter the text tower.
        prompts_vision: Whether prompts enter the image tower.
        reads_image: Whether prompts depend on the image's feature.
    """

    tunes: ClassVar[Literal["nothing", "prompts", "decoder", "all"]] = "prompts"
    prompts_text: ClassVar[bool] = False
    prompts_vision: ClassVar[bool] = False
    reads_image: ClassVar[bool] = False

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        if self.prompts_text:
            backbone.text.require_prompts()
        if self.prompts_vision:
            backbone.vision.require_prompts()

    def forward(self, image: Tensor | None = None) -> Rows:
        """Return the prompts of a step.

        Args:
            image: (B, d) features of the images, not normalised; for strategies that read them.
        """
        return Rows()


def checked_depth(depth: int, *layers: int) -> int:
    """Return ``depth`` if every tower has as many layers.

    Raises:
        VLPromptError: If one hasn't.
    """
    if not 1 <= depth <= min(layers):
        raise VLPromptError(
            f"depth={depth}: the prompted towers have {' and '.join(map(str, layers))} layers; "
            f"allowed: 1 to {min(layers)}."
        )
    return depth


def random_rows(shape: tuple[int, ...], seed: int, purpose: str = "context") -> Tensor:
    """Return float32 values of N(0, 0.02^2); row i does not depend on the depth."""
    return 0.02 * torch.randn(shape, generator=torch_rng(seed, "segmentation", purpose))


def text_rows(backbone: Backbone, depth: int, count: int, init: str, seed: int) -> Tensor:
    """Return (J, M, Dt) start values: the first row from a phrase if there is one, the others random.

    Args:
        backbone: The text tower is this one's.
        depth: J.
        count: M if there is no phrase.
        init: A phrase; M becomes its number of tokens.
        seed: Of the random values.

    Raises:
        DataError: If the phrase has no token.
    """
    tower = backbone.text
    if not init:
        return random_rows((depth, count, tower.width), seed)

    ids = tower.require_tokenizer().encode(init)
    if not ids:
        raise DataError(f"init={init!r} has no token to start the context from.")

    rows = random_rows((depth, len(ids), tower.width), seed)
    rows[0] = tower.embed_tokens(ids).float().cpu()
    return rows
