"""Sentences about phrases: CLIP's 80 templates, plain and longer ones, and words that nobody has taught."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES
from torch.nn.utils.rnn import pad_sequence

from pretraining.corpus import encode
from pretraining.photo_words import Vocabulary, plain_words
from vlprompt.core.seeding import derive_seed, numpy_rng
from vlprompt.training.batches import Batch, epoch_plan

__all__ = ["SentenceBatches", "said"]

UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # stands for a token that is never taught
_REPEATS = {"name": 4, "synonym": 2, "hypernym": 2, "plain": 4, "plural": 1, "near": 1}  # per epoch
_TEMPLATES = tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)
_MOST_UNKNOWN = 16  # words of context that CoOp usually learns


def said(phrase: str, above: str, adjectives: list[str], rng: np.random.Generator) -> str:
    """Return a sentence about a phrase.

    Args:
        phrase: What it is about.
        above: What that is a kind of.
        adjectives: Words to put before it.
        rng: Draws the form.
    """
    form = rng.random()
    if form < 0.15:
        return phrase
    if form < 0.7:
        return _TEMPLATES[int(rng.integers(len(_TEMPLATES)))].format(phrase)
    if form < 0.78:
        return f"a photo of a {phrase}, a type of {above}."

    unknown = " ".join([UNKNOWN] * int(rng.integers(1, _MOST_UNKNOWN + 1)))
    if form < 0.88:  # as learned context begins: vectors that mean nothing
        return f"{unknown} {phrase}."

    adjective = adjectives[int(rng.integers(len(adjectives)))] if rng.random() < 0.7 else UNKNOWN
    return f"a {adjective} {phrase}" if rng.random() < 0.5 else f"a photo of the {adjective} {phrase}."


class SentenceBatches:
    """Batches of sentences; every epoch says every phrase anew.

    Args:
        vocabulary: What is said.
        batch_size: Sentences per batch.
        seed: The run's seed.

    Attributes:
        seen_ids: CLIP token ids that can occur, ascending; a batch's tokens are numbers of them, and their count is
            the number of the unknown token.
    """

    def __init__(self, vocabulary: Vocabulary, batch_size: int, seed: int) -> None:
        self.vocabulary = vocabulary
        self.batch_size = batch_size
        self.seed = seed
        self.adjectives: list[str] = plain_words()["adjectives"]
        training_phrases = [i for i in range(len(vocabulary.phrases)) if i not in vocabulary.held_out]
        self.rows = np.array([i for i in training_phrases for _ in range(_REPEATS[vocabulary.kinds[i]])])
        fixed = [*_TEMPLATES, *self.adjectives, "a photo of the, a type of."]
        texts = [t.replace("{}", " ") for t in fixed] + [vocabulary.phrases[i] for i in training_phrases]
        ends = [token for text in texts for token in encode(text)]
        self.seen_ids = sorted(set(ends))
        self._place = {token: number for number, token in enumerate(self.seen_ids)}
        self.classes = 1 + max(max(m) for m in vocabulary.members)

    def plan(self, epoch: int) -> list[NDArray[np.int64]]:
        """See :meth:`vlprompt.training.batches.Batches.plan`; the numbers are of phrases."""
        return [self.rows[part] for part in epoch_plan(len(self.rows), self.batch_size, self.seed, epoch)]

    def fetch(self, indices: NDArray[np.int64], epoch: int) -> Batch:
        """See :meth:`vlprompt.training.batches.Batches.fetch`."""
        rng = numpy_rng(self.seed, "sentences", epoch, derive_seed(0, *indices.tolist()))
        words = self.vocabulary
        texts = [said(words.phrases[i], words.above[i], self.adjectives, rng) for i in indices]
        return {**self.tokens(texts), "members": self.members(indices)}

    def tokens(self, texts: list[str]) -> Batch:
        """Return ``text`` (B, T) token numbers, zero-padded, and ``last`` (B,) the place of each end of text."""
        rows = [self._numbers(text) for text in texts]
        last = torch.tensor([len(row) - 1 for row in rows])
        return {"text": pad_sequence([torch.tensor(row) for row in rows], batch_first=True), "last": last}

    def members(self, indices: NDArray[np.int64] | Sequence[int]) -> torch.Tensor:
        """Return (B, 1000) shares: 1 / n for each of the n classes that a phrase stands for."""
        shares = torch.zeros(len(indices), self.classes)
        for row, i in zip(shares, indices, strict=True):
            row[list(self.vocabulary.members[i])] = 1 / len(self.vocabulary.members[i])
        return shares

    def _numbers(self, text: str) -> list[int]:
        unknown = len(self.seen_ids)
        pieces = text.split(UNKNOWN)
        ids = [self._place.get(t, unknown) for t in encode(pieces[0])[:-1]]
        for piece in pieces[1:]:
            ids += [unknown, *(self._place.get(t, unknown) for t in encode(piece)[1:-1])]
        return [*ids, self._place[encode("")[-1]]]
