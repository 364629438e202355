"""Offsets of the frozen word embeddings around learned context: low-rank, by place, by token or by class.

Papers: Shi and Lipani, "DePT: Decomposed Prompt Tuning for Parameter-Efficient Fine-tuning", ICLR 2024, arXiv
2309.05173, section 2.2 (by place); Tang et al., "ADePT: Adaptive Decomposed Prompt Tuning", ICLR 2025 (by token). Both
were written for T5; offsets in the sentences of a CLIP are ours.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from typing_extensions import TypedDict

from vlprompt.backbones.layout import PromptLayout, is_slot
from vlprompt.backbones.text import TextTower
from vlprompt.core.errors import ConfigError
from vlprompt.core.names import listed_names
from vlprompt.core.options import whole_options
from vlprompt.core.seeding import torch_rng
from vlprompt.core.trainable import OwnRate
from vlprompt.learners.base import Learner

__all__ = ["OffsetMode", "OffsetOptions", "OffsetOver", "OffsetSentences", "Offsets", "longest_tail"]

log = logging.getLogger("vlprompt.learners")

OffsetMode = Literal["place", "token", "class"]
OffsetOver = Literal["tail", "name"]


class OffsetOptions(TypedDict, total=False):
    """Options of learners whose sentences may have offsets (see :class:`Offsets`).

    Attributes:
        offset_rank: r; 0: there are no offsets, and nothing else is computed than without the option.
        offset_mode: ``place``: one offset for each place in the tail; ``token``: for each token, wherever it stands,
            which leaves no gap in the names of new classes; ``class``: for each place of each class, which binds the
            learner to them.
        offset_rate: What the learning rate is multiplied by for offsets.
        offset_alpha: Scale of offsets by place and class, divided by sqrt(r).
        offset_over: What of a sentence has offsets: its ``tail``, all that is neither the start nor learned, or the
            class ``name`` alone.
        offset_places: S, places that have an offset; None: of the longest class. Set by the first classes, so that
            others have the same.
    """

    offset_rank: Annotated[int, Field(0, ge=0, le=1024)]
    offset_mode: Annotated[OffsetMode, Field("place")]
    offset_rate: Annotated[float, Field(0.1, gt=0)]
    offset_alpha: Annotated[float, Field(8.0, gt=0)]
    offset_over: Annotated[OffsetOver, Field("tail")]
    offset_places: Annotated[int | None, Field(None, ge=1, le=512)]


class Offsets(nn.Module, OwnRate):
    """What is added to the frozen embedding of tokens, before positions.

    With k = alpha / sqrt(r): by place ``k A[t] B``, A (S, r), B (r, Dt); by class ``k A[c, t] B``, A (C, S, r); by
    token ``relu(e A + a) B + b`` of its embedding e, A (Dt, r), B (r, Dt). A starts uniform in +-1 / sqrt(r), all else
    at 0, so that learning starts without offsets. Learned vectors have none, and are not counted as places.

    Places beyond S get no offset: an untrained row of A would be noise. Names that reach there are in the log.

    Args:
        layout: The sentences of the classes that are learned.
        tower: The text tower.
        classnames: C names.
        rank: r.
        mode: See :class:`OffsetOptions`.
        over: See :class:`OffsetOptions`.
        alpha: See :class:`OffsetOptions`.
        places: S, or None: of the longest class.
        rate: See :class:`OffsetOptions`.
        seed: Of the random start.
    """

    left_bias: nn.Parameter | None
    right_bias: nn.Parameter | None

    def __init__(
        self,
        layout: PromptLayout,
        tower: TextTower,
        classnames: Sequence[str],
        *,
        rank: int,
        mode: OffsetMode = "place",
        over: OffsetOver = "tail",
        alpha: float = 8.0,
        places: int | None = None,
        rate: float = 0.1,
        seed: int = 1,
    ) -> None:
        super().__init__()
        self.tower = tower
        self.mode = mode
        self.over = over
        self.rate = rate
        self.scale = alpha / rank**0.5
        self.classes = len(classnames)

        self.places = places or longest_tail(layout, tower, classnames, over)

        first = {"place": (self.places,), "token": (tower.width,), "class": (self.classes, self.places)}[mode]
        bound = rank**-0.5
        start = torch.empty(*first, rank).uniform_(-bound, bound, generator=torch_rng(seed, "offsets", mode))
        self.left = nn.Parameter(start)  # A
        self.right = nn.Parameter(torch.zeros(rank, tower.width))  # B
        by_token = mode == "token"
        self.register_parameter("left_bias", nn.Parameter(torch.zeros(rank)) if by_token else None)
        self.register_parameter("right_bias", nn.Parameter(torch.zeros(tower.width)) if by_token else None)

    def arrange(self, layout: PromptLayout, classnames: Sequence[str]) -> PromptLayout:
        """Return the same sentences with the numbers of their tokens' offsets.

        By place and by token equal beginnings stay equal, so they are run once as before; by class they end at the
        first offset.
        """
        tails = _tails(layout, self.tower, classnames, self.over)
        number_of = {}
        if self.mode == "token":
            distinct = {layout.sentences[c][place] for c, tail in enumerate(tails) for place in tail}
            number_of = {source: number for number, source in enumerate(sorted(distinct))}

        rows = []
        beyond = []
        for c, (sentence, tail) in enumerate(zip(layout.sentences, tails, strict=True)):
            numbers = [-1] * len(sentence)
            for t, place in enumerate(tail):
                numbers[place] = self._number(c, t) if self.mode != "token" else number_of[sentence[place]]
            rows.append(numbers)
            if self.mode != "token" and len(tail) > self.places:
                beyond.append(classnames[c])

        if beyond:
            log.warning(
                "offsets of words: %d places have one, and these classes have more, of which the rest gets none: %s. "
                "offset_mode=token has no such limit.",
                self.places,
                listed_names(beyond),
            )
        return layout.with_offsets(rows)

    def rows(self, layout: PromptLayout) -> Tensor:
        """Return the (K, Dt) offsets of an arranged layout."""
        if self.left_bias is None or self.right_bias is None:  # not by token
            return self.scale * self.left.flatten(0, -2) @ self.right
        embedded = self.tower.embed_tokens(layout.offset_sources).to(self.left.dtype)
        return torch.relu(embedded @ self.left + self.left_bias) @ self.right + self.right_bias

    def _number(self, c: int, t: int) -> int:
        """Return the number of place t of class c; -1 if it has no offset."""
        if t >= self.places or (self.mode == "class" and c >= self.classes):
            return -1
        return c * self.places + t if self.mode == "class" else t


def longest_tail(
    layout: PromptLayout, tower: TextTower, classnames: Sequence[str], over: OffsetOver = "tail"
) -> int:
    """Return S, the most tokens that have an offset in the sentence of a class."""
    return max(1, *(len(tail) for tail in _tails(layout, tower, classnames, over)))


def _tails(
    layout: PromptLayout, tower: TextTower, classnames: Sequence[str], over: OffsetOver
) -> list[list[int]]:
    """Return for each sentence the places in it that have an offset, in their order."""
    tokenizer = tower.require_tokenizer()
    first = len(tokenizer.start)
    tails = []
    for sentence, name in zip(layout.sentences, classnames, strict=True):
        tail = [i for i, source in enumerate(sentence) if i >= first and not is_slot(source)]
        tails.append(tail if over == "tail" else _name_in(sentence, tail, tokenizer.encode(name)))
    return tails


def _name_in(sentence: Sequence[int], tail: Sequence[int], name: Sequence[int]) -> list[int]:
    """Return the places of a class name among those of a tail; signs that melt into what follows are left out."""
    tokens = [sentence[place] for place in tail]
    for length in range(len(name), 0, -1):
        for start in range(len(tokens) - length, -1, -1):
            if tokens[start : start + length] == list(name[:length]):
                return list(tail[start : start + length])
    return []


class OffsetSentences(Learner):
    """Base of learners of context whose sentences may have offsets.

    A method calls :meth:`_begin_offsets` when it has made :attr:`layout`, and encodes by :meth:`_encode`.

    Attributes:
        layout: The sentences.
        offsets: What is added to their words, or None.
    """

    layout: PromptLayout
    offsets: Offsets | None

    def _begin_offsets(self, options: OffsetOptions, seed: int) -> None:
        """Make the offsets, if there are any, and number the layout's tokens."""
        options = whole_options(OffsetOptions, options)
        self.register_module("offsets", None)
        if not options["offset_rank"]:
            return

        mode = options["offset_mode"]
        self.offsets = Offsets(
            self.layout,
            self.backbone.text,
            self.classnames,
            rank=options["offset_rank"],
            mode=mode,
            over=options["offset_over"],
            alpha=options["offset_alpha"],
            places=options["offset_places"],
            rate=options["offset_rate"],
            seed=seed,
        )
        self.layout = self.offsets.arrange(self.layout, self.classnames)
        self.class_bound = self.class_bound or mode == "class"
        if mode != "token":  # a twin for other classes has as many places
            self.options["offset_places"] = self.offsets.places

    def _refuse_offsets(self, options: OffsetOptions, reason: str) -> None:
        """Raise ConfigError if there are to be offsets; for what has no learned sentences."""
        self.register_module("offsets", None)
        if whole_options(OffsetOptions, options)["offset_rank"]:
            raise ConfigError([f"offset_rank: {reason}"], f"learner {self.title()!r}")

    def _encode(
        self,
        context: Tensor,
        deep: Tensor | dict[int, Tensor] | None = None,
        layout: PromptLayout | None = None,
    ) -> Tensor:
        """Return (C, d) or (G, C, d) text features; arguments as of :meth:`TextTower.encode`."""
        layout = self.layout if layout is None else layout
        rows = None if self.offsets is None else self.offsets.rows(layout)
        return self.backbone.text.encode(layout, context, deep, offsets=rows)
