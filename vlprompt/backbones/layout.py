"""Where every token of every class's sentence comes from, arranged so that nothing is computed twice.

A sentence is a list of sources: a token id (>= 0) or a learned context slot ``slot(k)`` (< 0). From the
sentences of all classes a layout finds the longest common beginning, which a causal tower needs to run only
once, and packs what is left of each sentence into tiles without padding. A token may have the number of an offset,
which is added to its embedding; then two beginnings are the same where their offsets are, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vlprompt.core.errors import VLPromptError

__all__ = [
    "DeepPrompts",
    "PromptLayout",
    "Slots",
    "Tiles",
    "add_rows",
    "insert_rows",
    "is_slot",
    "slot",
    "slot_number",
]

DeepPrompts = Mapping[int, Tensor]
"""Block, from 1, to (G or 1, K, Dt): what replaces before that block the states at the places of slots below K."""

_TILE = (
    64  # tokens per tile: long enough for efficient attention, short enough that a tile's mask stays cheap
)


def slot(number: int) -> int:
    """Return the source that stands for learned context vector ``number`` >= 0."""
    return -1 - number


def is_slot(source: int) -> bool:
    """Tell whether a source is a learned context vector."""
    return source < 0


def slot_number(source: int) -> int:
    """Return which learned context vector a slot source stands for."""
    return -1 - source


@dataclass(frozen=True)
class Slots:
    """Where a flat list of sources refers to learned vectors: plain numbers, so that traced graphs have fixed shapes.

    Attributes:
        places: Ascending places in the list.
        numbers: Which vector stands at each.
    """

    places: tuple[int, ...]
    numbers: tuple[int, ...]

    @classmethod
    def of(cls, sources: Iterable[int]) -> Slots:
        """Find the slots of a list of sources."""
        pairs = [(place, slot_number(source)) for place, source in enumerate(sources) if is_slot(source)]
        return cls(tuple(place for place, _ in pairs), tuple(number for _, number in pairs))

    @classmethod
    def numbered(cls, numbers: Iterable[int]) -> Slots:
        """Find the places of a list of numbers, of which those below 0 stand for none."""
        pairs = [(place, number) for place, number in enumerate(numbers) if number >= 0]
        return cls(tuple(place for place, _ in pairs), tuple(number for _, number in pairs))

    def window(self, start: int, stop: int) -> Slots:
        """Return the slots of a part of the list, counted from its beginning."""
        pairs = zip(self.places, self.numbers, strict=True)
        inside = [(place - start, number) for place, number in pairs if start <= place < stop]
        return Slots(tuple(place for place, _ in inside), tuple(number for _, number in inside))

    def below(self, count: int) -> Slots:
        """Return the slots of the first ``count`` vectors."""
        pairs = zip(self.places, self.numbers, strict=True)
        kept = [(place, number) for place, number in pairs if number < count]
        return Slots(tuple(place for place, _ in kept), tuple(number for _, number in kept))


def insert_rows(x: Tensor, slots: Slots, rows: Tensor) -> Tensor:
    """Put learned vectors into their places.

    Args:
        x: (G or 1, R, W) states of R tokens.
        slots: The places of the R tokens that are learned; vector k becomes ``rows[:, k]``. Those of vectors from K on
            stay as they are.
        rows: (G or 1, K, W) learned vectors.

    Returns:
        (G or 1, R, W) of x's type; ``x`` itself if nothing is learned.
    """
    slots = slots.below(rows.shape[-2])
    if not slots.places:
        return x

    groups = max(x.shape[0], rows.shape[0])
    places = torch.tensor(slots.places, device=x.device)
    chosen = rows[:, torch.tensor(slots.numbers, device=rows.device)].to(x.dtype)
    return x.expand(groups, -1, -1).index_copy(1, places, chosen.expand(groups, -1, -1))


def add_rows(x: Tensor, places: Slots, rows: Tensor) -> Tensor:
    """Add learned vectors at their places.

    Args:
        x: (G or 1, R, W) embeddings of R tokens.
        places: The places of the R tokens to which ``rows[:, k]`` is added, by their numbers k.
        rows: (G or 1, K, W) learned vectors.

    Returns:
        (G or 1, R, W) of x's type; ``x`` itself if there are no places.
    """
    if not places.places:
        return x

    groups = max(x.shape[0], rows.shape[0])
    index = torch.tensor(places.places, device=x.device)
    chosen = rows[:, torch.tensor(places.numbers, device=rows.device)].to(x.dtype)
    return x.expand(groups, -1, -1).index_add(1, index, chosen.expand(groups, -1, -1))


@dataclass(frozen=True)
class Tiles:
    """The sentences' own parts, packed: R tiles of S tokens each.

    Attributes:
        sources: (R, S) sources; unused places hold token 0.
        positions: (R, S) place of each token in its sentence.
        mask: (R, 1, S, P + S) True where a token may look: all of the shared prefix, and its own sentence so
            far.
        ends: (C,) flat index into the R * S tokens of each sentence's last token, in class order.
        end_rows: (R, E) tile-local index of each sentence end, repeated to the longest row; for the last
            block.
        end_slots: (C,) flat index into the R * E end rows, in class order.
        slots: Where the R * S sources refer to learned vectors.
        offsets: Where offsets are added to them.
    """

    sources: Tensor
    positions: Tensor
    mask: Tensor
    ends: Tensor
    end_rows: Tensor
    end_slots: Tensor
    slots: Slots
    offsets: Slots


class PromptLayout:
    """The sentences of C classes, ready for a text tower.

    Args:
        sentences: C lists of sources, each from the start token to the end token.
        context_length: Longest sentence the tower can read, in tokens.
        names: What to call the sentences in error messages.
        share_prefix: Find and share the common beginning; off for towers that aren't causal.
        offsets: For each sentence the number of every source's offset, -1 for none; None: there are none.

    Attributes:
        slots: Number of learned context vectors the sentences refer to (highest + 1).
        shared: P, tokens of the beginning that all sentences share.
        prefix: (P,) sources of that beginning.
        prefix_slots: Its learned places.
        prefix_offsets: Its places with an offset.
        offsets: For each sentence the numbers of offsets, or None.
        offset_count: Number of offsets the sentences refer to (highest + 1).
        shares_prefix: Whether a common beginning is looked for.

    Raises:
        VLPromptError: If there is no sentence, one is longer than ``context_length``, or a learned vector is to have
            an offset.
    """

    def __init__(
        self,
        sentences: Sequence[Sequence[int]],
        context_length: int,
        names: Sequence[str] | None = None,
        share_prefix: bool = True,
        offsets: Sequence[Sequence[int]] | None = None,
    ) -> None:
        if not sentences:
            raise VLPromptError("a text prompt needs at least one class.")

        self.sentences = [tuple(s) for s in sentences]
        self.shares_prefix = share_prefix
        self._parts: dict[tuple[int, int], PromptLayout] = {}
        self.context_length = context_length

        for i, sentence in enumerate(self.sentences):
            if len(sentence) > context_length:
                name = _shortened(names[i]) if names else f"number {i}"
                raise VLPromptError(
                    f"the prompt of class {name} has {len(sentence)} tokens, the text tower reads {context_length}. "
                    "Shorten the class name or the context."
                )

        self.offsets = None if offsets is None else _checked_offsets(self.sentences, offsets)
        self.offset_count = 1 + max((number for row in self.offsets or () for number in row), default=-1)

        # Where there are offsets, what sentences share has equal ones.
        compared: list[tuple[Any, ...]] = list(self.sentences)
        if self.offsets is not None:
            both = zip(self.sentences, self.offsets, strict=True)
            compared = [tuple(zip(sentence, numbers, strict=True)) for sentence, numbers in both]
        self.shared = _common_prefix(compared) if share_prefix else 0
        numbers = [slot_number(s) for sentence in self.sentences for s in sentence if is_slot(s)]
        self.slots = 1 + max(numbers, default=-1)
        self.prefix = torch.tensor(self.sentences[0][: self.shared], dtype=torch.long)
        self.prefix_slots = Slots.of(self.sentences[0][: self.shared])
        self.prefix_offsets = Slots.numbered(self.offsets[0][: self.shared] if self.offsets else ())

    def __len__(self) -> int:
        return len(self.sentences)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sentence."""
        return [len(s) for s in self.sentences]

    def padded(self, length: int | None = None, pad: int = 0) -> Tensor:
        """Return (C, T) sources of the whole sentences, padded to ``length`` (default: the longest) with ``pad``."""
        length = length or max(self.lengths)
        return torch.tensor([[*s, *[pad] * (length - len(s))] for s in self.sentences], dtype=torch.long)

    def padded_slots(self, length: int) -> Slots:
        """Return the slots of :meth:`padded`, row after row."""
        places: list[int] = []
        numbers: list[int] = []
        for row, sentence in enumerate(self.sentences):
            slots = Slots.of(sentence)
            places += [row * length + place for place in slots.places]
            numbers += slots.numbers
        return Slots(tuple(places), tuple(numbers))

    def padded_offsets(self, length: int) -> Slots:
        """Return the places of :meth:`padded` that have an offset, row after row."""
        rows = self.offsets or [() for _ in self.sentences]
        return Slots.numbered(number for row in rows for number in (*row, *[-1] * (length - len(row))))

    @cached_property
    def offset_sources(self) -> Tensor:
        """(K,) one of the sources that each offset is added to; 0 for a number that none has."""
        sources = [0] * self.offset_count
        for sentence, numbers in zip(self.sentences, self.offsets or (), strict=False):
            for source, number in zip(sentence, numbers, strict=True):
                if number >= 0:
                    sources[number] = source
        return torch.tensor(sources, dtype=torch.long)

    def with_offsets(self, offsets: Sequence[Sequence[int]]) -> PromptLayout:
        """Return the layout of the same sentences, whose sources have the numbered offsets (-1: none)."""
        return PromptLayout(
            self.sentences, self.context_length, share_prefix=self.shares_prefix, offsets=offsets
        )

    def part(self, classes: range) -> PromptLayout:
        """Return the layout of some consecutive classes; made once, since every step asks for it."""
        key = (classes.start, classes.stop)
        if key not in self._parts:
            some = slice(*key)
            self._parts[key] = PromptLayout(
                self.sentences[some],
                self.context_length,
                share_prefix=self.shares_prefix,
                offsets=None if self.offsets is None else self.offsets[some],
            )
        return self._parts[key]

    @cached_property
    def tiles(self) -> Tiles:
        """The sentences without the shared prefix, packed."""
        remainders = [s[self.shared :] for s in self.sentences]
        offsets = None if self.offsets is None else [row[self.shared :] for row in self.offsets]
        return _pack(remainders, self.shared, offsets)


def _shortened(name: str) -> str:
    """Quote a name; one that is too long for a tower is too long for a message."""
    return repr(name if len(name) <= 60 else f"{name[:28]} ... {name[-28:]}")


def _checked_offsets(
    sentences: Sequence[tuple[int, ...]], offsets: Sequence[Sequence[int]]
) -> list[tuple[int, ...]]:
    """Return the offsets of sentences, as long as these."""
    for sentence, numbers in zip(sentences, offsets, strict=True):
        for source, number in zip(sentence, numbers, strict=True):
            if number >= 0 and is_slot(source):
                raise VLPromptError("an offset is added to a token's embedding, not to a learned vector.")
    return [tuple(numbers) for numbers in offsets]


def _common_prefix(sentences: Sequence[tuple[Any, ...]]) -> int:
    """Return how many first sources all sentences share, leaving each at least one of its own."""
    limit = min(len(s) for s in sentences) - 1
    first = sentences[0]
    for i in range(limit):
        if any(s[i] != first[i] for s in sentences):
            return i
    return limit


def _pack(remainders: Sequence[Sequence[int]], offset: int, offsets: Sequence[Sequence[int]] | None) -> Tiles:
    """Pack sentences into equal tiles, of the size near ``_TILE`` that leaves the fewest places unused."""
    total = sum(map(len, remainders))
    longest = max(map(len, remainders))
    even = -(-total // -(-total // _TILE))  # what fills just as many tiles evenly
    sizes = sorted({min(total, max(longest, size)) for size in (even, even + 1, _TILE)})
    packed = [(_fill(remainders, size), size) for size in sizes]
    rows, size = min(packed, key=lambda p: len(p[0]) * p[1])

    return _tensors(remainders, rows, size, offset, offsets)


def _fill(remainders: Sequence[Sequence[int]], size: int) -> list[list[int]]:
    """First-fit-decreasing: sentences by tile, for tiles of ``size`` tokens."""
    rows: list[list[int]] = []
    room: list[int] = []
    first_open = 0

    for c in sorted(range(len(remainders)), key=lambda c: -len(remainders[c])):
        need = len(remainders[c])
        row = next((r for r in range(first_open, len(rows)) if room[r] >= need), None)
        if row is None:
            row = len(rows)
            rows.append([])
            room.append(size)

        rows[row].append(c)
        room[row] -= need

        while first_open < len(rows) and room[first_open] == 0:
            first_open += 1

    return rows


def _tensors(
    remainders: Sequence[Sequence[int]],
    rows: list[list[int]],
    size: int,
    offset: int,
    offsets: Sequence[Sequence[int]] | None,
) -> Tiles:
    sources = torch.zeros(len(rows), size, dtype=torch.long)
    numbers = torch.full((len(rows), size), -1)
    positions = torch.zeros(len(rows), size, dtype=torch.long)
    owner = torch.full((len(rows), size), -1)
    most = max(map(len, rows))
    end_rows = torch.zeros(len(rows), most, dtype=torch.long)
    ends = torch.zeros(len(remainders), dtype=torch.long)
    end_slots = torch.zeros(len(remainders), dtype=torch.long)

    for r, classes in enumerate(rows):
        at = 0
        for e, c in enumerate(classes):
            length = len(remainders[c])
            sources[r, at : at + length] = torch.tensor(remainders[c])
            positions[r, at : at + length] = torch.arange(offset, offset + length)
            if offsets is not None:
                numbers[r, at : at + length] = torch.tensor(offsets[c], dtype=torch.long)
            owner[r, at : at + length] = c
            at += length
            end_rows[r, e] = at - 1
            ends[c] = r * size + at - 1
            end_slots[c] = r * most + e

    causal = torch.ones(size, size, dtype=torch.bool).tril()
    inside = (owner[:, :, None] == owner[:, None, :]) & causal
    mask = torch.cat([torch.ones(len(rows), size, offset, dtype=torch.bool), inside], dim=-1)
    slots = Slots.of(sources.flatten().tolist())
    added = Slots.numbered(numbers.flatten().tolist()) if offsets is not None else Slots((), ())
    return Tiles(sources, positions, mask[:, None], ends, end_rows, end_slots, slots, added)
