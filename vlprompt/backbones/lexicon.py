"""Words that a text tower was not taught, read as taught phrases for what they are like."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import cached_property

__all__ = ["Lexicon"]

_WORD = re.compile(r"[^\W\d_]+(?:['-][^\W\d_]+)*")
_LONGEST = 6  # words of a phrase
_SHORTEST = 3  # letters of a noun: "a" and "in" are nouns of WordNet as well
_PARTS = ("side", "front", "back", "top", "view")  # beside the parts of bodies


class Lexicon:
    """What phrases are read as.

    Args:
        taught: Phrases that the text tower was taught, in lower case.
        readings: For other nouns, one of those phrases.
        parts: Words for parts of bodies; after a noun they say which part of it a photograph shows.
        plain: Words that say nothing of what a photograph shows, as those of templates.
    """

    def __init__(
        self, taught: Sequence[str], readings: dict[str, str], parts: Sequence[str], plain: Sequence[str]
    ) -> None:
        self.taught = frozenset(taught)
        self.readings = readings
        self.parts = frozenset([*parts, *_PARTS])
        self.plain = frozenset(plain)

    def read(self, text: str) -> tuple[str, list[str]]:
        """Return a text as it is read, and its words that have no reading.

        The longest phrases are found first. Words of templates and taught phrases stay as they are.
        """
        words = list(_WORD.finditer(text))
        pieces: list[str] = []
        unplaced: list[str] = []
        end = 0
        at = 0
        after_noun = False

        while at < len(words):
            length, reading = self._longest(text, words[at : at + _LONGEST])
            start, stop = words[at].start(), words[at + length - 1].end()
            gap = text[end:start]
            original = text[start:stop]

            if after_noun and gap.isspace() and original.lower() in self.parts:
                reading, gap = "", ""
            elif reading is None and original.lower() not in self.plain:
                unplaced.append(original)

            after_noun = bool(reading) and original.lower() not in self.plain
            pieces += [gap, original if reading is None else reading]
            end = stop
            at += length

        return "".join([*pieces, text[end:]]), unplaced

    def _longest(self, text: str, words: Sequence[re.Match[str]]) -> tuple[int, str | None]:
        for length in range(len(words), 0, -1):
            written = text[words[0].start() : words[length - 1].end()]
            phrase = written.lower().replace("-", " ") if length > 1 else written.lower()
            if phrase in self.plain:
                return length, None
            if phrase in self.taught:
                return length, written
            for form in (phrase, *_singulars(phrase), _plural(phrase)):
                if form in self.taught:
                    return length, form
                if len(form) >= _SHORTEST and form in self.readings:
                    return length, self.readings[form]
        return 1, None

    def differ(self, name: str, other: str) -> bool:
        """Return whether two names are different words, though they may be read as the same phrase."""
        is_read = any(self.read(word)[0] != word for word in (name, other))
        return is_read and name.casefold() != other.casefold()

    @cached_property
    def digest(self) -> str:
        """12 hexadecimal digits that change when something is read otherwise."""
        entries = [
            *sorted(self.taught),
            *(f"{word}={phrase}" for word, phrase in sorted(self.readings.items())),
        ]
        text = "\x1f".join([*entries, *sorted(self.parts), *sorted(self.plain)])
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def _singulars(phrase: str) -> list[str]:
    """Return what an English plural may be the plural of."""
    if phrase.endswith("ies"):
        return [f"{phrase[:-3]}y"]
    if phrase.endswith(("xes", "zes", "ches", "shes", "sses")):
        return [phrase[:-2]]
    return [phrase[:-1]] if phrase.endswith("s") and not phrase.endswith("ss") else []


def _plural(phrase: str) -> str:
    """Return an English plural: some things are only called so, as binoculars."""
    if phrase.endswith("y") and phrase[-2:-1] not in tuple("aeiou"):
        return f"{phrase[:-1]}ies"
    return f"{phrase}es" if phrase.endswith(("s", "x", "z", "ch", "sh")) else f"{phrase}s"
