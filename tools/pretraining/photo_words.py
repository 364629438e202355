"""Words for what ``photo`` sees: names of ImageNet's classes, what they are kinds of, and kinds of them.

WordNet 3.0 says which words mean a class and what is above and below it. A word stands for the classes that are
below its meaning: "dog" for 118 of them, "beagle" for one. Of a word's meanings the most frequent counts that has
such classes. WordNet's noun files are read from a folder (Debian's package ``wordnet-base`` puts them into
``/usr/share/wordnet``); they are needed for training alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from vlprompt.core.errors import DataError
from vlprompt.core.seeding import numpy_rng
from vlprompt.data.imagenet import synset_ids, synset_names

__all__ = ["Vocabulary", "WordNet", "plain_words", "read_vocabulary"]

_NEAR = 60  # kinds of something that more classes are kinds of say too little about an image


class WordNet:
    """The nouns of WordNet 3.0.

    Args:
        folder: Holds ``data.noun`` and ``index.noun``.

    Attributes:
        lemmas: Words by synset, a synset being eight digits.
        above: Hypernyms by synset, of classes and of instances.

    Raises:
        DataError: If the files are missing; says where to get them.
    """

    def __init__(self, folder: Path) -> None:
        folder = Path(folder).expanduser()
        if missing := [n for n in ("data.noun", "index.noun") if not (folder / n).is_file()]:
            raise DataError(
                f"wordnet: {folder} holds no {missing[0]}. Install Debian's wordnet-base (apt-get install "
                "wordnet-base), or unpack it anywhere and say wordnet=FOLDER. It is needed for this training alone."
            )

        self.lemmas: dict[str, list[str]] = {}
        self.above: dict[str, list[str]] = {}
        self._index = folder / "index.noun"

        for line in (folder / "data.noun").read_text(encoding="utf-8").splitlines():
            if line.startswith("  "):  # the licence
                continue

            fields = line.split(" ")
            words = int(fields[3], 16)
            at = 4 + 2 * words
            pointers = [fields[at + 1 + 4 * i : at + 5 + 4 * i] for i in range(int(fields[at]))]
            self.lemmas[fields[0]] = [w.replace("_", " ") for w in fields[4:at:2]]
            self.above[fields[0]] = [p[1] for p in pointers if p[0] in ("@", "@i") and p[2] == "n"]

    @cached_property
    def below(self) -> dict[str, list[str]]:
        """Hyponyms by synset."""
        children = defaultdict(list)
        for synset, parents in self.above.items():
            for parent in parents:
                children[parent].append(synset)
        return children

    @cached_property
    def senses(self) -> dict[str, list[str]]:
        """Synsets by word in lower case, the most frequent first."""
        return {word: fields[-int(fields[2]) :] for word, fields in self._entries.items()}

    def is_common(self, word: str) -> bool:
        """Tell whether WordNet's texts use a word (in lower case) at all."""
        fields = self._entries.get(word, [])
        return bool(fields) and int(fields[-int(fields[2]) - 1]) > 0

    @cached_property
    def _entries(self) -> dict[str, list[str]]:
        lines = self._index.read_text(encoding="utf-8").splitlines()
        return {f[0].replace("_", " "): f for f in (li.split() for li in lines if not li.startswith("  "))}

    def ancestors(self, synset: str) -> set[str]:
        """Return everything above a synset."""
        synsets: set[str] = set()
        waiting = list(self.above[synset])
        while waiting:
            one = waiting.pop()
            if one not in synsets:
                synsets.add(one)
                waiting += self.above[one]

        return synsets


@dataclass(frozen=True)
class Vocabulary:
    """P phrases and what they stand for.

    Attributes:
        phrases: In lower case, sorted within a kind.
        members: Numbers of the classes (0 to 999) each stands for.
        kinds: ``"name"`` (CLIP's curated name of a class), ``"synonym"``, ``"hypernym"``, ``"plain"``, ``"plural"``,
            ``"near"`` (a word for something that is no class, but a kind of one, or of what few classes are kinds of).
        above: For each, a phrase for what it is a kind of; itself if there is none.
        held_out: Numbers of synonyms and hypernyms of several words that are kept from training.
    """

    phrases: list[str]
    members: list[tuple[int, ...]]
    kinds: list[str]
    above: list[str]
    held_out: frozenset[int]

    def of_kind(self, *kinds: str) -> list[int]:
        """Return the numbers of phrases of some kinds that are not held out."""
        return [i for i, kind in enumerate(self.kinds) if kind in kinds and i not in self.held_out]


def plain_words() -> dict[str, Any]:
    """Return ``words`` (word to WordNet words) and ``adjectives``."""
    text = files("pretraining").joinpath("photo_words.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)


def read_vocabulary(wordnet: WordNet, held_out: float, seed: int, near: bool = True) -> Vocabulary:
    """Collect phrases.

    Args:
        wordnet: Where synonyms and hypernyms come from.
        held_out: Share of synonyms and hypernyms of several words that are kept from training, in [0, 1).
        seed: Draws them.
        near: Also words for what is no class itself.

    Raises:
        DataError: If a class is not in it.
    """
    ids = [name[1:] for name in synset_ids("imagenet")]
    if missing := [i for i in ids if i not in wordnet.lemmas]:
        raise DataError(
            f"wordnet: synset {missing[0]} of ImageNet is not in it; WordNet must be version 3.0."
        )

    members_of: dict[str, set[int]] = defaultdict(set)

    for number, synset in enumerate(ids):
        for above in {synset} | wordnet.ancestors(synset):
            members_of[above].add(number)

    entries: dict[str, tuple[str, frozenset[int], str]] = {}
    for number, name in enumerate(synset_names("imagenet")):
        entries[name.lower()] = ("name", frozenset([number]), ids[number])

    for word, synset in _words(wordnet, members_of):
        kind = "synonym" if synset in set(ids) else "hypernym"
        entries.setdefault(word, (kind, frozenset(members_of[synset]), synset))

    for word, meanings in plain_words()["words"].items():
        rows = [entries[m.lower()] for m in meanings if m.lower() in entries]
        if rows:
            entries[word] = ("plain", frozenset().union(*(r[1] for r in rows)), rows[0][2])

    for word, (kind, members, synset) in list(entries.items()):
        if kind in ("name", "hypernym", "plain") and word.isalpha() and not word.endswith("s"):
            entries.setdefault(_plural(word), ("plural", members, synset))

    for word, synset in _near(wordnet, members_of) if near else ():
        parents = [p for p in wordnet.above[synset] if p in members_of and len(members_of[p]) <= _NEAR]
        entries.setdefault(word, ("near", frozenset().union(*(members_of[p] for p in parents)), parents[0]))

    return _arranged(wordnet, members_of, entries, held_out, seed)


def _words(wordnet: WordNet, members_of: dict[str, set[int]]) -> Iterator[tuple[str, str]]:
    """Yield every word of the known synsets with the most frequent of its known meanings."""
    for word in sorted({lemma.lower() for synset in members_of for lemma in wordnet.lemmas[synset]}):
        order = wordnet.senses.get(word, [])
        meanings = [s for s in order if s in members_of]
        if meanings:
            yield word, meanings[0]


def _near(wordnet: WordNet, members_of: dict[str, set[int]]) -> Iterator[tuple[str, str]]:
    """Yield common words whose most frequent meaning is directly below a known one that few classes are kinds of."""
    for parent in sorted(p for p, members in members_of.items() if len(members) <= _NEAR):
        for synset in wordnet.below[parent]:
            if synset in members_of:
                continue
            for lemma in wordnet.lemmas[synset]:
                word = lemma.lower()
                if wordnet.is_common(word) and wordnet.senses[word][0] == synset:
                    yield word, synset


def _plural(word: str) -> str:
    if word.endswith("y") and word[-2:-1] not in "aeiou":
        return f"{word[:-1]}ies"
    return f"{word}es" if word.endswith(("x", "z", "ch", "sh")) else f"{word}s"


def _arranged(
    wordnet: WordNet,
    members_of: dict[str, set[int]],
    entries: dict[str, tuple[str, frozenset[int], str]],
    held_out: float,
    seed: int,
) -> Vocabulary:
    phrases = sorted(entries, key=lambda p: (entries[p][0], p))
    kinds = [entries[p][0] for p in phrases]
    free = [i for i, kind in enumerate(kinds) if kind in ("synonym", "hypernym") and " " in phrases[i]]
    held_out_order = numpy_rng(seed, "words held out").permutation(len(free))[: round(held_out * len(free))]
    back = frozenset(free[i] for i in held_out_order)
    trained = {p for i, p in enumerate(phrases) if i not in back}

    def above(phrase: str) -> str:
        kind, _, synset = entries[phrase]
        for one in [synset] if kind == "near" else _closest_first(wordnet, members_of, synset):
            for lemma in wordnet.lemmas[one]:
                if lemma.lower() in trained and entries[lemma.lower()][2] == one and lemma.lower() != phrase:
                    return lemma.lower()
        return phrase

    members = [tuple(sorted(entries[p][1])) for p in phrases]
    return Vocabulary(phrases, members, kinds, [above(p) for p in phrases], back)


def _closest_first(wordnet: WordNet, members_of: dict[str, set[int]], synset: str) -> Sequence[str]:
    return sorted(
        (a for a in wordnet.ancestors(synset) if a in members_of), key=lambda a: (len(members_of[a]), a)
    )
