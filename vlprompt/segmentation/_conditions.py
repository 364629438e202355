"""Features of phrases, with learned context before them if there is any; nothing is computed twice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlprompt.backbones.layout import PromptLayout, slot
from vlprompt.backbones.text import TextTower

__all__ = ["Conditions"]

_LAYOUTS = 64  # arrangements of phrases that are kept


class Conditions:
    """Text features of phrases, from a text tower.

    Args:
        tower: The text tower.
        words: Return every token's state too (CRIS), not only the phrase's feature.
    """

    def __init__(self, tower: TextTower, words: bool = False) -> None:
        self.tower = tower
        self.with_words = words
        self._cache: dict[str, tuple[Tensor, Tensor | None]] = {}
        self._layouts: dict[tuple[Any, ...], PromptLayout] = {}

    def clear(self) -> None:
        """Drop cached features, because what they were computed with has changed."""
        self._cache = {}

    def __call__(
        self, texts: Sequence[str], rows: Tensor | None = None, remember: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Return (B, d) features, not normalised, and (B, T, Dt) states of the words if they are wanted.

        Args:
            texts: B phrases.
            rows: (J, M, Dt) prompts, or (B, J, M, Dt), one set per phrase.
            remember: Cache the features; nothing that they depend on changes until :meth:`clear`.

        Raises:
            VLPromptError: If a phrase is too long for the tower; names it.
        """
        if rows is not None and rows.dim() == 4:
            return self._encode(texts, rows)

        unique = list(dict.fromkeys(texts))
        if remember:
            features, words = self._cached(unique, rows)
        else:
            features, words = self._encode(unique, rows)
        if len(unique) == len(texts):
            return features, words

        position = {text: i for i, text in enumerate(unique)}
        index = torch.tensor([position[text] for text in texts], device=features.device)
        return features[index], None if words is None else words[index]

    def _cached(self, texts: list[str], rows: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return features and words of different phrases; those that are new are encoded together."""
        fresh = [text for text in texts if text not in self._cache]
        if fresh:
            features, words = self._encode(fresh, rows)
            lengths = self._layout(tuple(fresh), rows).lengths
            for i, text in enumerate(fresh):
                # The padding is cut off: it depends on the phrases that are encoded together.
                states = None if words is None else words[i, : lengths[i]]
                self._cache[text] = (features[i], states)

        features = torch.stack([self._cache[text][0] for text in texts])
        words = self._joined([self._cache[text][1] for text in texts])
        return features, words

    def _joined(self, words: list[Any]) -> Tensor | None:
        """Stack (T_i, Dt) states, padded with zeros."""
        if not self.with_words:
            return None
        return torch.nn.utils.rnn.pad_sequence(words, batch_first=True)

    def _encode(self, texts: Sequence[str], rows: Tensor | None) -> tuple[Tensor, Tensor | None]:
        layout = self._layout(tuple(texts), rows)
        context = None
        deep = None
        if rows is not None:
            # One set per phrase: phrase i refers to slots i M ... i M + M - 1 of one long context.
            flat = rows if rows.dim() == 3 else rows.transpose(0, 1).flatten(1, 2)
            context = flat[0]
            deep = flat[1:] if len(flat) > 1 else None

        if not self.with_words:
            return self.tower.encode(layout, context, deep), None
        words, features = self.tower.encode_words(layout, context, deep)
        return features, words

    def _layout(self, texts: tuple[str, ...], rows: Tensor | None) -> PromptLayout:
        count = 0 if rows is None else rows.shape[-2]
        is_per_phrase = rows is not None and rows.dim() == 4

        key = (texts, count, is_per_phrase)
        if key in self._layouts:
            return self._layouts[key]

        if len(self._layouts) >= _LAYOUTS:
            oldest = next(iter(self._layouts))
            self._layouts.pop(oldest)

        sentences = []

        for i, text in enumerate(texts):
            first = i * count if is_per_phrase else 0
            slots = [slot(first + k) for k in range(count)]
            sentences.append(self.tower.sentence(*slots, text))

        self._layouts[key] = self.tower.layout(sentences, texts)
        return self._layouts[key]
