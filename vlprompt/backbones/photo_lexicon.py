"""How ``photo`` reads words that nobody taught it: as the taught phrase that stands for what is most like them.

``weights/photo_lexicon.json.gz`` gives such a phrase for every concrete noun of WordNet: "ketch" is read as a phrase
for sailing vessels. The phrases were found without images (see ``tools/pretraining/photo_lexicon.py``).
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from torch import Tensor

from vlprompt.backbones.tokenizer import TextTokenizer

__all__ = ["LEXICON", "Lexicon", "LexiconTokenizer", "shipped_lexicon"]

#: Where the lexicon lies inside the package.
LEXICON = Path(str(files("vlprompt.backbones"))) / "weights" / "photo_lexicon.json.gz"

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
            for form in (phrase, *_singulars(phrase)):
                if form in self.taught:
                    return length, form
                if len(form) >= _SHORTEST and form in self.readings:
                    return length, self.readings[form]
        return 1, None


class LexiconTokenizer:
    """A tokenizer that reads every text through a lexicon first.

    Args:
        inner: CLIP's tokenizer.
        lexicon: What words are read as.
    """

    def __init__(self, inner: TextTokenizer, lexicon: Lexicon) -> None:
        self._inner = inner
        self.lexicon = lexicon
        self.start = inner.start
        self.end = inner.end
        self.pad = inner.pad
        self.context_length = inner.context_length

    def encode(self, text: str) -> list[int]:
        """Return the ids of the words alone."""
        return self._inner.encode(self.lexicon.read(text)[0])

    def rows(self, texts: Sequence[str], length: int) -> Tensor:
        """Return (N, length) padded rows."""
        return self._inner.rows([self.lexicon.read(t)[0] for t in texts], length)

    def unplaced(self, text: str) -> list[str]:
        """Return the words that are neither taught nor read as something that is."""
        return self.lexicon.read(text)[1]


@lru_cache(maxsize=1)
def shipped_lexicon() -> Lexicon:
    """Return the lexicon in the package."""
    content: dict[str, Any] = json.loads(gzip.decompress(LEXICON.read_bytes()))
    return Lexicon(content["taught"], content["readings"], content["parts"], content["plain"])


def _singulars(phrase: str) -> list[str]:
    """Return what an English plural may be the plural of."""
    if phrase.endswith("ies"):
        return [f"{phrase[:-3]}y"]
    if phrase.endswith(("xes", "zes", "ches", "shes", "sses")):
        return [phrase[:-2]]
    return [phrase[:-1]] if phrase.endswith("s") and not phrase.endswith("ss") else []
