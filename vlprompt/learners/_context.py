"""Learned context in sentences: where it starts from and where it stands. Shared by every text-prompt learner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from vlprompt.backbones.layout import PromptLayout, slot
from vlprompt.backbones.text import TextTower
from vlprompt.core.errors import DataError
from vlprompt.core.seeding import torch_rng

__all__ = ["Position", "context_layout", "initial_context"]

Position = Literal["end", "middle", "front"]


def initial_context(tower: TextTower, length: int, init: str = "", seed: int = 1, copies: int = 1) -> Tensor:
    """Return (copies * M, Dt) float32 start values of learned context.

    Args:
        tower: The text tower the context enters.
        length: M, if there is no phrase.
        init: A phrase whose token embeddings are taken; M becomes its number of tokens (not of words).
        seed: Of N(0, 0.02^2).
        copies: Independent contexts, one after the other; a phrase starts all of them alike.

    Raises:
        DataError: If the phrase has no token.
    """
    tower.require_prompts()
    if not init:
        return 0.02 * torch.randn(copies * length, tower.width, generator=torch_rng(seed, "context"))

    ids = tower.require_tokenizer().encode(init.replace("_", " "))
    if not ids:
        raise DataError(f"init={init!r} has no token to start the context from.")
    return tower.embed_tokens(ids).float().cpu().repeat(copies, 1)


def context_layout(
    tower: TextTower,
    classnames: Sequence[str],
    count: int,
    position: Position = "end",
    class_specific: bool = False,
    suffix: str = ".",
) -> PromptLayout:
    """Return the sentences of all classes with ``count`` context slots each.

    The full stop and the class name are tokenised together, as in a written sentence. In the middle the first
    ``count // 2`` vectors stand before the name.

    Args:
        tower: The text tower the context enters.
        classnames: C names.
        count: M, slots per class.
        position: Where the name stands: behind the context, between its halves, or before it.
        class_specific: Whether each class has M slots to itself, so that there are C * M.
        suffix: What follows the sentence's last piece.
    """
    before = {"end": count, "middle": count // 2, "front": 0}[position]

    sentences = []
    for number, name in enumerate(classnames):
        first = number * count if class_specific else 0
        slots = [slot(first + k) for k in range(count)]

        pieces: list[str | int] = [*slots[:before], name, *slots[before:], suffix]
        if before == count:  # the full stop belongs to the name's own tokens
            pieces = [*slots, f"{name}{suffix}"]
        sentences.append(tower.sentence(*pieces))

    return tower.layout(sentences, classnames)
