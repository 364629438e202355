"""Where every token of every class's sentence comes from, arranged so that nothing is computed twice.

A sentence is a list of sources: a token id (>= 0) or a learned context slot ``slot(k)`` (< 0). From the
sentences of all classes a layout finds the longest common beginning, which a causal tower needs to run only
once, and packs what is left of each sentence into tiles without padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vlprompt.core.errors import VLPromptError

__all__ = ["PromptLayout", "Tiles", "insert_rows", "is_slot", "slot", "slot_number"]

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


def insert_rows(x: Tensor, sources: Tensor, rows: Tensor) -> Tensor:
    """Put learned vectors where the sources say so.

    Args:
        x: (G or 1, R, W) states of R tokens.
        sources: (R,) where each token comes from; at slot k the state becomes ``rows[:, k]``.
        rows: (G or 1, K, W) learned vectors.

    Returns:
        (G or 1, R, W); ``x`` itself if no source is a slot.
    """
    sources = sources.to(x.device)
    places = (sources < 0).nonzero()[:, 0]
    if not len(places):
        return x

    groups = max(len(x), len(rows))
    chosen = rows[:, -1 - sources[places]].to(x.dtype)
    return x.expand(groups, -1, -1).index_copy(1, places, chosen.expand(groups, -1, -1))


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
    """

    sources: Tensor
    positions: Tensor
    mask: Tensor
    ends: Tensor
    end_rows: Tensor
    end_slots: Tensor


class PromptLayout:
    """The sentences of C classes, ready for a text tower.

    Args:
        sentences: C lists of sources, each from the start token to the end token.
        context_length: Longest sentence the tower can read, in tokens.
        names: What to call the sentences in error messages.
        share_prefix: Find and share the common beginning; off for towers that aren't causal.

    Raises:
        VLPromptError: If there is no sentence, or one is longer than ``context_length``.
    """

    def __init__(
        self,
        sentences: Sequence[Sequence[int]],
        context_length: int,
        names: Sequence[str] | None = None,
        share_prefix: bool = True,
    ) -> None:
        if not sentences:
            raise VLPromptError("a text prompt needs at least one class.")

        self.sentences = [tuple(s) for s in sentences]
        self.context_length = context_length

        for i, sentence in enumerate(self.sentences):
            if len(sentence) > context_length:
                name = _shortened(names[i]) if names else f"number {i}"
                raise VLPromptError(
                    f"the prompt of class {name} has {len(sentence)} tokens, the text tower reads {context_length}. "
                    "Shorten the class name or the context."
                )

        self.shared = _common_prefix(self.sentences) if share_prefix else 0

    def __len__(self) -> int:
        return len(self.sentences)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sentence."""
        return [len(s) for s in self.sentences]

    @cached_property
    def slots(self) -> int:
        """Number of learned context vectors the sentences refer to (highest + 1)."""
        return 1 + max((slot_number(s) for row in self.sentences for s in row if is_slot(s)), default=-1)

    @cached_property
    def prefix(self) -> Tensor:
        """(P,) sources of the beginning that all sentences share."""
        return torch.tensor(self.sentences[0][: self.shared], dtype=torch.long)

    def padded(self, length: int | None = None, pad: int = 0) -> Tensor:
        """Return (C, T) sources of the whole sentences, padded to ``length`` (default: the longest) with ``pad``."""
        length = length or max(self.lengths)
        return torch.tensor([[*s, *[pad] * (length - len(s))] for s in self.sentences], dtype=torch.long)

    @cached_property
    def tiles(self) -> Tiles:
        """The sentences without the shared prefix, packed."""
        remainders = [s[self.shared :] for s in self.sentences]
        return _pack(remainders, self.shared)


def _shortened(name: str) -> str:
    """Quote a name; one that is too long for a tower is too long for a message."""
    return repr(name if len(name) <= 60 else f"{name[:28]} ... {name[-28:]}")


def _common_prefix(sentences: Sequence[tuple[int, ...]]) -> int:
    """Return how many first sources all sentences share, leaving each at least one of its own."""
    limit = min(len(s) for s in sentences) - 1
    first = sentences[0]
    for i in range(limit):
        if any(s[i] != first[i] for s in sentences):
            return i
    return limit


def _pack(remainders: Sequence[Sequence[int]], offset: int) -> Tiles:
    """Pack sentences into equal tiles, of the size near ``_TILE`` that leaves the fewest places unused."""
    total = sum(map(len, remainders))
    longest = max(map(len, remainders))
    even = -(-total // -(-total // _TILE))  # what fills just as many tiles evenly
    sizes = sorted({min(total, max(longest, size)) for size in (even, even + 1, _TILE)})
    packed = [(_fill(remainders, size), size) for size in sizes]
    rows, size = min(packed, key=lambda p: len(p[0]) * p[1])

    return _tensors(remainders, rows, size, offset)


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


def _tensors(remainders: Sequence[Sequence[int]], rows: list[list[int]], size: int, offset: int) -> Tiles:
    sources = torch.zeros(len(rows), size, dtype=torch.long)
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
            owner[r, at : at + length] = c
            at += length
            end_rows[r, e] = at - 1
            ends[c] = r * size + at - 1
            end_slots[c] = r * most + e

    causal = torch.ones(size, size, dtype=torch.bool).tril()
    inside = (owner[:, :, None] == owner[:, None, :]) & causal
    mask = torch.cat([torch.ones(len(rows), size, offset, dtype=torch.bool), inside], dim=-1)
    return Tiles(sources, positions, mask[:, None], ends, end_rows, end_slots)
