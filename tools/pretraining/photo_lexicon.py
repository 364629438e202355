"""Finds, for every concrete noun of WordNet, the phrase that ``photo`` reads and that stands for what is most like it.

A noun's target is a convex combination of the classifier's rows (ConSE, Norouzi et al. 2014), with weights from two
similarities to the classes: Lin's over the hypernyms, with intrinsic information content (Seco et al. 2004), and the
cosine of the glosses. Its reading is the taught phrase that lands nearest to the target. The mixture was chosen by
:func:`held_back_accuracy`, on classes of ImageNet's own list, and by no photograph.

    python -m pretraining.photo_lexicon [FOLDER OF WORDNET 3.0]      writes weights/photo_lexicon.json.gz; from tools/
"""

from __future__ import annotations

import gzip
import json
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES
from scipy.sparse import csr_matrix

from pretraining.photo_words import WordNet, plain_words, read_vocabulary
from vlprompt.backbones import create_backbone
from vlprompt.backbones.lite0 import class_rows, load_lite0
from vlprompt.backbones.photo_lexicon import LEXICON
from vlprompt.core.seeding import numpy_rng
from vlprompt.data.imagenet import synset_ids

__all__ = ["Mixture", "Similarities", "held_back_accuracy", "write_lexicon"]

#: WordNet's files of nouns that are placed: animals, artefacts, bodies, food, objects, plants. People are not.
_CONCRETE = {"05", "06", "08", "13", "17", "20"}
_BODY = "08"
_WORD = re.compile(r"[a-z]+")


@dataclass(frozen=True)
class Mixture:
    """How similarities become shares.

    Attributes:
        gloss: Weight of the glosses beside the hypernyms.
        sharpness: Factor before the softmax over classes.
        nearest: Classes that have a share.
        least: Sum of both similarities to the nearest class below which a noun is not placed.
    """

    gloss: float = 2.0
    sharpness: float = 5.0
    nearest: int = 30
    least: float = 0.72

    def shares(self, lin: NDArray[np.float64], gloss: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return (N, C) shares that add up to 1, of two (N, C) similarities."""
        total = lin + self.gloss * gloss
        least = np.partition(total, -self.nearest, axis=1)[:, -self.nearest, None]
        shares = np.exp(self.sharpness * (total - total.max(1, keepdims=True))) * (total >= least)
        return shares / shares.sum(1, keepdims=True)


class Similarities:
    """Of synsets to ImageNet's classes.

    Args:
        folder: Of WordNet 3.0.
    """

    def __init__(self, folder: Path) -> None:
        self.wordnet = WordNet(folder)
        self.ids = [name[1:] for name in synset_ids("imagenet")]
        self.kind: dict[str, str] = {}
        self.gloss: dict[str, str] = {}
        for line in (folder / "data.noun").read_text(encoding="utf-8").splitlines():
            if not line.startswith("  "):
                synset, kind = line.split(" ", 2)[:2]
                self.kind[synset] = kind
                self.gloss[synset] = line.partition(" | ")[2].partition('"')[0]

        self._up = {s: self.wordnet.ancestors(s) | {s} for s in self.wordnet.lemmas}
        below = Counter(a for up in self._up.values() for a in up)
        self._content = {s: 1 - np.log(below[s]) / np.log(len(self._up)) for s in self._up}
        self._common: dict[str, NDArray[np.float64]] = {}
        for number, one in enumerate(self.ids):
            for above in self._up[one]:
                self._common.setdefault(above, np.zeros(len(self.ids)))[number] = self._content[above]

        self._terms: dict[str, int] = {}
        documents = Counter(t for s in self._up for t in set(self._tokens(s)))
        self._rarity = {t: np.log(len(self._up) / n) for t, n in documents.items()}
        self._terms = {t: i for i, t in enumerate(documents)}

    def _tokens(self, synset: str) -> list[str]:
        return _WORD.findall(" ".join([*self.wordnet.lemmas[synset], self.gloss[synset]]).lower())

    def _counts(self, synsets: list[str]) -> csr_matrix:
        rows, columns, values = [], [], []
        for row, synset in enumerate(synsets):
            counts = {self._terms[t]: self._rarity[t] for t in set(self._tokens(synset))}
            norm = sum(v * v for v in counts.values()) ** 0.5
            rows += [row] * len(counts)
            columns += list(counts)
            values += [v / norm for v in counts.values()]
        return csr_matrix((values, (rows, columns)), shape=(len(synsets), len(self._terms)))

    def of(self, synsets: list[str]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return (N, C) Lin similarities and (N, C) cosines of glosses."""
        content = np.array([self._content[i] for i in self.ids])
        lin = np.zeros((len(synsets), len(self.ids)))
        for row, synset in enumerate(synsets):
            known = [self._common[a] for a in self._up[synset] if a in self._common]
            if known:
                lin[row] = 2 * np.max(known, axis=0) / (self._content[synset] + content)
        return lin, (self._counts(synsets) @ self._counts(self.ids).T).toarray()


def held_back_accuracy(
    similarities: Similarities, rows: torch.Tensor, mixture: Mixture, parts: int = 20, seed: int = 1
) -> float:
    """Return how often a class's row is nearest to its own target, made from the classes that are not held back.

    Args:
        similarities: Of WordNet.
        rows: (C, d) unit rows of the classifier.
        mixture: What is tried.
        parts: The classes are held back in so many parts; each chooses among the classes of its part.
        seed: Draws the parts.
    """
    lin, gloss = similarities.of(similarities.ids)
    right = 0
    for part in np.array_split(numpy_rng(seed, "classes held back").permutation(len(rows)), parts):
        kept = np.setdiff1d(np.arange(len(rows)), part)
        shares = torch.from_numpy(mixture.shares(lin[np.ix_(part, kept)], gloss[np.ix_(part, kept)])).float()
        target = F.normalize(shares @ rows[kept], dim=-1)
        right += int(((rows[part] @ target.T).argmax(1) == torch.arange(len(part))).sum())
    return right / len(rows)


def write_lexicon(folder: Path, mixture: Mixture, path: Path = LEXICON) -> dict[str, float]:
    """Write the lexicon and return what is known of it.

    Args:
        folder: Of WordNet 3.0.
        mixture: From classes held back.
        path: The file, JSON in gzip.
    """
    similarities = Similarities(folder)
    wordnet = similarities.wordnet
    vocabulary = read_vocabulary(wordnet, 0.05, 1)
    taught = [p for i, p in enumerate(vocabulary.phrases) if i not in vocabulary.held_out]
    singular = [vocabulary.phrases[i] for i in vocabulary.of_kind("name", "synonym", "hypernym", "plain")]
    unit = F.normalize(class_rows(load_lite0()), dim=-1)
    senses = {}
    known = {*taught, *_plain()}
    for word, synsets in wordnet.senses.items():
        concrete = [s for s in synsets if similarities.kind[s] in _CONCRETE]
        if concrete and word not in known and _WORD.match(word):
            senses[word] = concrete

    backbone = create_backbone("photo")
    joint = F.normalize(backbone.model.visual.projection.T @ unit.T, dim=0).T
    landed = backbone.class_weights(singular, ["a photo of a {}."])
    synsets = sorted({s for several in senses.values() for s in several})
    reading: dict[str, str] = {}
    for start in range(0, len(synsets), 2048):
        part = synsets[start : start + 2048]
        lin, gloss = similarities.of(part)
        placed = (lin + mixture.gloss * gloss).max(1) >= mixture.least
        shares = torch.from_numpy(mixture.shares(lin, gloss)).float()
        best = (F.normalize(shares @ joint, dim=-1) @ landed.T).argmax(1).tolist()
        reading |= {s: singular[i] for s, i, near in zip(part, best, placed, strict=True) if near}

    readings = {}
    for word, several in sorted(senses.items()):
        if found := [reading[s] for s in several if s in reading]:
            readings[word] = found[0]

    about = {"held_back_accuracy": held_back_accuracy(similarities, unit, mixture), "words": len(readings)}
    parts = sorted(w for w in senses if similarities.kind[wordnet.senses[w][0]] == _BODY)
    content = {
        "about": about,
        "taught": sorted(taught),
        "plain": sorted(_plain()),
        "parts": parts,
        "readings": readings,
    }
    path.write_bytes(gzip.compress(json.dumps(content, separators=(",", ":")).encode(), mtime=0))

    return about


def _plain() -> set[str]:
    """Return the words of CLIP's templates, and adjectives."""
    templates = " ".join(t("") for t in OPENAI_IMAGENET_TEMPLATES)
    return {
        *_WORD.findall(templates.lower()),
        *plain_words()["adjectives"],
        "type",
        "an",
        "and",
        "with",
        "in",
        "on",
    }


if __name__ == "__main__":
    print(write_lexicon(Path(sys.argv[1] if len(sys.argv) > 1 else "/usr/share/wordnet"), Mixture()))
