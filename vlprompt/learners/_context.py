"""Learned context in sentences: where it starts from and where it stands. Shared by every text-prompt learner."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vlprompt.backbones.layout import PromptLayout, slot
from vlprompt.backbones.text import TextTower
from vlprompt.core.errors import DataError
from vlprompt.core.seeding import torch_rng

__all__ = ["NO_ATTRIBUTES", "Attributes", "Position", "context_layout", "initial_context"]

Position = Literal["end", "middle", "front"]


@dataclass(frozen=True)
class Attributes:
    """Attribute words in front of a sentence, each behind learned vectors of its own.

    ``["color", "shape"]`` gives [start | m learned | color | m learned | shape | what the learner has there]; the words
    stay as written. Their learned vectors are the context's last A * m rows. Where deep prompts replace the context in
    deeper layers, these vectors and the words flow on.

    Paper: Li et al., "Advancing Textual Prompt Learning with Anchored Attributes" (ATPrompt), ICCV 2025, arXiv
        2412.09442, section 3. In the authors' code every attribute is taken for one token, which shifts the sentence
        behind a longer one; here a word takes the tokens it has.

    Attributes:
        words: A words or phrases, of one data set (for EuroSAT "habitat"); none changes nothing.
        length: m, learned vectors in front of each.
    """

    words: Sequence[str] = ()
    length: int = 2

    def joined(self, context: Tensor, seed: int) -> Tensor:
        """Return (K + A * m, Dt) start values: of a context, then N(0, 0.01^2) for the attributes."""
        count = self.length * len(self.words)
        drawn = torch.randn(count, context.shape[-1], generator=torch_rng(seed, "attributes"))
        return torch.cat([context, 0.01 * drawn])

    def pieces(self, tower: TextTower, first: int) -> list[int]:
        """Return the sources in front of a sentence; the learned ones start at slot ``first``.

        Raises:
            DataError: If the tokenizer reads nothing in a word.
        """
        sources: list[int] = []
        for number, word in enumerate(self.words):
            tokens = tower.require_tokenizer().encode(word)
            if not tokens:
                raise DataError(f"attributes: the tokenizer reads nothing in {word!r}. Leave it out.")
            own = first + number * self.length
            sources += [*(slot(own + k) for k in range(self.length)), *tokens]
        return sources


NO_ATTRIBUTES = Attributes()


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
    attributes: Attributes = NO_ATTRIBUTES,
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
        attributes: What stands in front of it; its slots come behind those of the context.
    """
    copies = len(classnames) if class_specific else 1
    front = attributes.pieces(tower, copies * count)
    before = {"end": count, "middle": count // 2, "front": 0}[position]

    sentences = []
    for number, name in enumerate(classnames):
        first = number * count if class_specific else 0
        slots = [slot(first + k) for k in range(count)]

        pieces: list[str | int] = [*slots[:before], name, *slots[before:], suffix]
        if before == count:  # the full stop belongs to the name's own tokens
            pieces = [*slots, f"{name}{suffix}"]
        sentences.append(tower.sentence(*front, *pieces))

    return tower.layout(sentences, classnames)
