"""Captioned scenes made ready for training once: pixels on disk, tokens and facts in memory."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
from numpy.typing import NDArray

from vlprompt.core.seeding import derive_seed
from vlprompt.data.scenes.pairs import CaptionPairs
from vlprompt.data.scenes.render import render
from vlprompt.data.scenes.sentences import Sentences, attribute_sentences
from vlprompt.data.scenes.tasks import GENERATOR

__all__ = ["Corpus", "encode", "read_corpus", "render_all"]


@dataclass(frozen=True)
class Corpus:
    """N images with K captions each.

    Attributes:
        images: (N, H, W, 3) uint8, memory-mapped.
        tokens: (N, K, T) uint16 indices into ``seen_ids``, zero-padded.
        last: (N, K) position of each caption's end-of-text token.
        truth: (N, facts) bool, what is true of each image.
        stated: (N, K, most) numbers of the facts each caption states, padded with -1.
        seen_ids: CLIP token ids that occur, ascending.
        labels: (N, A) int16, which value of each attribute is true of an image; -1 where none is.
        sentences: Attribute -> values -> sentences that state it, each a list of indices into ``seen_ids``.
    """

    images: NDArray[np.uint8]
    tokens: NDArray[np.uint16]
    last: NDArray[np.uint8]
    truth: NDArray[np.bool_]
    stated: NDArray[np.int32]
    seen_ids: list[int]
    labels: NDArray[np.int16]
    sentences: dict[str, list[list[list[int]]]]

    def positives(self, indices: NDArray[np.int64], draw: int) -> NDArray[np.bool_]:
        """Return (B, B): is caption ``draw`` of sample j true of image i?"""
        truth = self.truth[indices]
        stated = self.stated[indices, draw]
        positive = np.ones((len(indices), len(indices)), bool)

        for number in range(stated.shape[1]):  # a caption is true where every fact it states is true
            column = stated[:, number]
            positive &= truth[:, column] | (column < 0)[None]

        return positive


def read_corpus(pairs: CaptionPairs, captions: int, cache: Path, workers: int = 1) -> Corpus:
    """Render images and tokenise captions once, before training.

    Args:
        pairs: The captioned scenes.
        captions: Captions per image (K).
        cache: The pixels are kept beside this name, under a key of what they show, and reused.
        workers: Processes that render.
    """
    images = render_all(pairs, cache, workers)
    texts: list[list[str]] = []
    numbers_by_sentence: dict[str, int] = {}
    truths = []
    stated = []

    for index in range(len(pairs)):
        captions_drawn = pairs.captions(index, captions)
        texts.append([c.text for c in captions_drawn])
        truths.append(
            [numbers_by_sentence.setdefault(f, len(numbers_by_sentence)) for f in sorted(pairs.facts(index))]
        )
        stated.append(
            [
                [numbers_by_sentence.setdefault(f, len(numbers_by_sentence)) for f in sorted(c.facts)]
                for c in captions_drawn
            ]
        )

    truth = np.zeros((len(pairs), len(numbers_by_sentence)), bool)
    for row, numbers in zip(truth, truths, strict=True):
        row[numbers] = True

    most = max(len(f) for row in stated for f in row)
    padded = np.array([[f + [-1] * (most - len(f)) for f in row] for row in stated], np.int32)
    named = attribute_sentences()
    return Corpus(
        images=images,
        truth=truth,
        stated=padded,
        labels=_labels(truth, numbers_by_sentence, named),
        **_tokenise(texts, {name: list(values.values()) for name, values in named.items()}),
    )


def encode(text: str) -> list[int]:
    """Return CLIP's token ids of a sentence, with start and end of text and without padding."""
    tokenizer = _tokenizer()
    return [tokenizer.sot_token_id, *tokenizer.encode(text), tokenizer.eot_token_id]


@lru_cache(maxsize=1)
def _tokenizer() -> open_clip.SimpleTokenizer:
    return open_clip.SimpleTokenizer()


def _labels(
    truth: NDArray[np.bool_], numbers_by_sentence: Mapping[str, int], named: Sentences
) -> NDArray[np.int16]:
    labels = np.full((len(truth), len(named)), -1, np.int16)
    for column, values in enumerate(named.values()):
        for number, fact in enumerate(values):
            if fact in numbers_by_sentence:
                labels[truth[:, numbers_by_sentence[fact]], column] = number
    return labels


def _tokenise(captions: list[list[str]], sentences: dict[str, list[list[str]]]) -> dict[str, Any]:
    """Tokenise and renumber the tokens that occur 0, 1, 2, ... in the order of their ids."""
    stating = {text for values in sentences.values() for said in values for text in said}
    ids = {text: encode(text) for text in stating.union(*captions)}
    used_ids = sorted({i for row in ids.values() for i in row})
    position = {token: number for number, token in enumerate(used_ids)}
    numbers = {text: [position[t] for t in row] for text, row in ids.items()}
    longest = max(len(numbers[text]) for row in captions for text in row)
    tokens = np.zeros((len(captions), len(captions[0]), longest), np.uint16)
    last = np.zeros(tokens.shape[:2], np.uint8)

    for i, row in enumerate(captions):
        for j, text in enumerate(row):
            tokens[i, j, : len(numbers[text])] = numbers[text]
            last[i, j] = len(numbers[text]) - 1

    numbered = {
        name: [[numbers[text] for text in said] for said in values] for name, values in sentences.items()
    }
    return {"tokens": tokens, "last": last, "seen_ids": used_ids, "sentences": numbered}


def render_all(pairs: CaptionPairs, cache: Path, workers: int) -> NDArray[np.uint8]:
    """Return (N, H, W, 3) uint8 pixels of all images, drawn once and kept beside ``cache``, memory-mapped."""
    shape = (len(pairs), pairs.size, pairs.size, 3)
    store_key = derive_seed(pairs.seed, GENERATOR, pairs.holdout, pairs.easy, shape)

    cache = cache.with_name(f"{cache.stem}-{store_key:x}.u8")
    if not (cache.is_file() and cache.stat().st_size == int(np.prod(shape))):
        cache.parent.mkdir(parents=True, exist_ok=True)
        part = cache.with_suffix(".part")
        pixels = np.memmap(part, np.uint8, "w+", shape=shape)
        chunks = [range(i, min(i + 512, len(pairs))) for i in range(0, len(pairs), 512)]

        with ProcessPoolExecutor(workers) as pool:
            rendered = pool.map(_render_chunk, [pairs] * len(chunks), chunks)
            for chunk, block in zip(chunks, rendered, strict=True):
                pixels[chunk.start : chunk.stop] = block

        pixels.flush()
        part.replace(cache)

    return np.memmap(cache, np.uint8, "r", shape=shape)


def _render_chunk(pairs: CaptionPairs, chunk: range) -> NDArray[np.uint8]:
    return np.stack([render(pairs.spec(i), pairs.size).image for i in chunk])
