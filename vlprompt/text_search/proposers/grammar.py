"""Templates from a small grammar: an offline proposer that recombines phrases of the best templates so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Annotated

import numpy as np
from pydantic import Field

from vlprompt.core.errors import ConfigError, UnknownNameError
from vlprompt.data.base import hash_strings
from vlprompt.text_search.phrases import PHRASES
from vlprompt.text_search.proposers import PROPOSERS
from vlprompt.text_search.proposers.base import Proposal, Proposer, Request

__all__ = ["Grammar"]

_PARENTS = 10  # of the best templates
_TRIES = 30  # draws for each template that is wanted
_ENUMERATED = 50_000  # sentences; a smaller grammar is used up to the last one


@dataclass(frozen=True)
class _Head:
    """What stands before the class name; ``free`` is text that the grammar does not know."""

    opening: str = ""
    adjective: str = ""
    medium: str = ""
    determiner: str = ""
    free: str = ""

    def text(self) -> str:
        if self.free:
            return self.free
        if not self.medium:
            return _joined(self.opening, self.determiner, self.adjective)
        described = _joined(self.adjective, self.medium)
        return _joined(self.opening, _article(described), described, "of", self.determiner)


@dataclass(frozen=True)
class _Tail:
    """What stands behind the class name."""

    kind: str = ""
    place: str = ""
    free: str = ""

    def text(self) -> str:
        if self.free:
            return self.free
        place = f" {self.place}" if self.place else ""
        return f"{self.kind}{place}"


_HEAD = ("opening", "adjective", "medium", "determiner")
_TAIL = ("kind", "place")


@PROPOSERS.register("grammar", summary="recombines phrases of good templates; offline")
class Grammar(Proposer):
    """Sentences of slots: "[opening] [a adjective medium of] [determiner] {} [kind] [place]".

    A proposal is a new sentence (``fresh`` of them), one of the ten best with a slot changed, filled or emptied, or a
    cross of two of them, slot by slot. What stands before and behind the class name in hand-written templates takes
    part, also where the grammar does not know it. Good templates are drawn more often, by their rank.

    Args:
        phrases: Slot to phrases that replace the shipped ones; "" leaves a slot out.
        fresh: Share of proposals that owe nothing to the best ones.

    Raises:
        ConfigError: For a slot that does not exist, or one without phrases.
    """

    def __init__(
        self,
        *,
        phrases: Mapping[str, list[str]] | None = None,
        fresh: Annotated[float, Field(ge=0, le=1)] = 0.25,
    ) -> None:
        self.phrases = {**PHRASES, **_checked(phrases or {})}
        self.fresh = fresh

        listed = (f"{slot}={phrase}" for slot in sorted(self.phrases) for phrase in self.phrases[slot])
        self.identity = f"grammar fresh={fresh:g} phrases={hash_strings(listed)}"

        heads = [_Head(*slots) for slots in product(*(self.phrases[slot] for slot in _HEAD))]
        tails = [_Tail(*slots) for slots in product(*(self.phrases[slot] for slot in _TAIL))]
        self._heads = {head.text(): head for head in reversed(heads)}  # of equal texts the first counts
        self._tails = {tail.text(): tail for tail in reversed(tails)}

    def propose(self, request: Request) -> Proposal:
        """See :meth:`Proposer.propose`."""
        parents = [self.parse(candidate.template) for candidate in request.history[:_PARENTS]]
        known = {self.parse(candidate.template) for candidate in request.history}
        heads = list(
            dict.fromkeys([*self._heads.values(), *sorted({h for h, _ in known if h.free}, key=_Head.text)])
        )
        tails = list(
            dict.fromkeys([*self._tails.values(), *sorted({t for _, t in known if t.free}, key=_Tail.text)])
        )

        texts: list[str] = []
        taken = set(request.seen)
        for _ in range(_TRIES * request.count):
            if len(texts) == request.count:
                break
            text = _sentence(*self._drawn(parents, heads, tails, request.rng))
            if text.casefold() not in taken:
                taken.add(text.casefold())
                texts.append(text)

        if len(texts) < request.count and len(heads) * len(tails) <= _ENUMERATED:
            rest = [text for text in map(_sentence_of, product(heads, tails)) if text.casefold() not in taken]
            rest = list(dict.fromkeys(rest))
            order = request.rng.permutation(len(rest))[: request.count - len(texts)]
            texts += [rest[int(i)] for i in order]
        return Proposal(texts, exhausted=not texts)

    def parse(self, template: str) -> tuple[_Head, _Tail]:
        """Return the slots of a template; text that the grammar does not know stays whole."""
        before, _, behind = template.partition("{}")
        before = " ".join(before.split())
        behind = behind.rstrip(" .")
        head = self._heads.get(before) or _Head(free=before)
        return head, self._tails.get(behind) or _Tail(free=behind)

    def _drawn(
        self,
        parents: Sequence[tuple[_Head, _Tail]],
        heads: Sequence[_Head],
        tails: Sequence[_Tail],
        rng: np.random.Generator,
    ) -> tuple[_Head, _Tail]:
        """Return one proposal."""
        if not parents or rng.random() < self.fresh:
            return self._new_head(heads, rng), self._new_tail(tails, rng)

        head, tail = _ranked(parents, rng)
        if len(parents) > 1 and rng.random() < 0.4:
            other_head, other_tail = _ranked(parents, rng)
            return self._cross(head, other_head, rng), tail if rng.random() < 0.5 else other_tail
        return self._mutated(head, tail, heads, tails, rng)

    def _mutated(
        self,
        head: _Head,
        tail: _Tail,
        heads: Sequence[_Head],
        tails: Sequence[_Tail],
        rng: np.random.Generator,
    ) -> tuple[_Head, _Tail]:
        """Return a template with one slot swapped, emptied or filled."""
        slot = str(rng.choice([*_HEAD, *_TAIL]))
        if slot in _HEAD:
            if head.free:
                return self._new_head(heads, rng), tail
            return replace(head, **{slot: self._phrase(slot, rng)}), tail
        if tail.free:
            return head, self._new_tail(tails, rng)
        return head, replace(tail, **{slot: self._phrase(slot, rng)})

    def _cross(self, first: _Head, second: _Head, rng: np.random.Generator) -> _Head:
        """Return a head whose slots come from two; whole, where one is free text."""
        if first.free or second.free:
            return first if rng.random() < 0.5 else second
        picks = rng.integers(2, size=len(_HEAD))
        return _Head(
            (first, second)[picks[0]].opening,
            (first, second)[picks[1]].adjective,
            (first, second)[picks[2]].medium,
            (first, second)[picks[3]].determiner,
        )

    def _new_head(self, heads: Sequence[_Head], rng: np.random.Generator) -> _Head:
        """Return a head slot by slot, each left out in half of the draws; now and then one that was written by hand."""
        free = [head for head in heads if head.free]
        if free and rng.random() < 0.2:
            return free[int(rng.integers(len(free)))]
        return _Head(*(self._sparse(slot, rng) for slot in _HEAD))

    def _new_tail(self, tails: Sequence[_Tail], rng: np.random.Generator) -> _Tail:
        free = [tail for tail in tails if tail.free]
        if free and rng.random() < 0.2:
            return free[int(rng.integers(len(free)))]
        return _Tail(*(self._sparse(slot, rng) for slot in _TAIL))

    def _phrase(self, slot: str, rng: np.random.Generator) -> str:
        phrases = self.phrases[slot]
        return phrases[int(rng.integers(len(phrases)))]

    def _sparse(self, slot: str, rng: np.random.Generator) -> str:
        if "" in self.phrases[slot] and rng.random() < 0.5:
            return ""
        return self._phrase(slot, rng)


def _ranked(parents: Sequence[tuple[_Head, _Tail]], rng: np.random.Generator) -> tuple[_Head, _Tail]:
    """Return a parent, drawn by its rank: weights n, n - 1, ..., 1."""
    weights = np.arange(len(parents), 0, -1, dtype=float)
    return parents[int(rng.choice(len(parents), p=weights / weights.sum()))]


def _sentence(head: _Head, tail: _Tail) -> str:
    before = head.text()
    return f"{before} {{}}{tail.text()}." if before else f"{{}}{tail.text()}."


def _sentence_of(parts: tuple[_Head, _Tail]) -> str:
    return _sentence(*parts)


def _joined(*words: str) -> str:
    return " ".join(word for word in words if word)


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _checked(phrases: Mapping[str, list[str]]) -> dict[str, tuple[str, ...]]:
    """Return phrases by slot, cleaned."""
    for slot, listed in phrases.items():
        if slot not in PHRASES:
            raise ConfigError([f"phrases: {UnknownNameError('slot', slot, PHRASES)}"], "proposer 'grammar'")
        if not listed:
            raise ConfigError(
                [f"phrases.{slot}: it needs at least one phrase; '' leaves the slot out."],
                "proposer 'grammar'",
            )
    return {slot: tuple(" ".join(phrase.split()) for phrase in listed) for slot, listed in phrases.items()}
