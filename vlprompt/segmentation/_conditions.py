"""Features of phrases, with learned context in front of them where there is some; nothing is computed twice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vlprompt.backbones.layout import PromptLayout, slot
from vlprompt.backbones.text import TextTower

__all__ = ["Conditions"]

_LAYOUTS = 64  # arrangements of phrases that are remembered


class Conditions:
    """What a text tower says of phrases.

    Args:
        tower: The text tower.
        words: Give every token's state too (CRIS), not only the phrase's feature.
    """

    def __init__(self, tower: TextTower, words: bool = False) -> None:
        self.tower, self.with_words = tower, words
        self._known: dict[str, tuple[Tensor, Tensor | None]] = {}
        self._layouts: dict[tuple[Any, ...], PromptLayout] = {}

    def clear(self) -> None:
        """Forget features, because what they were computed with has changed."""
        self._known = {}

    def __call__(
        self, texts: Sequence[str], rows: Tensor | None = None, remember: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Return (B, d) features, not normalised, and (B, T, Dt) states of the words if they are wanted.

        Args:
            texts: B phrases.
            rows: (J, M, Dt) prompts, or (B, J, M, Dt), one set per phrase.
            remember: Nothing here changes until :meth:`clear`.

        Raises:
            VLPromptError: If a phrase is too long for the tower; names it.
        """
        if rows is not None and rows.dim() == 4:
            return self._encode(texts, rows)
        unique = list(dict.fromkeys(texts))
        if not remember:
            features, words = self._encode(unique, rows)
        else:
            if fresh := [text for text in unique if text not in self._known]:
                features, words = self._encode(fresh, rows)
                lengths = self._layout(tuple(fresh), rows).lengths
                for i, text in enumerate(fresh):  # without the padding, which depends on the company
                    self._known[text] = (features[i], None if words is None else words[i, : lengths[i]])
            features = torch.stack([self._known[text][0] for text in unique])
            words = self._joined([self._known[text][1] for text in unique])
        if len(unique) == len(texts):
            return features, words
        place = {text: i for i, text in enumerate(unique)}
        index = torch.tensor([place[text] for text in texts], device=features.device)
        return features[index], None if words is None else words[index]

    def _joined(self, words: list[Any]) -> Tensor | None:
        """Stack (T_i, Dt) states, filled up with zeros."""
        return torch.nn.utils.rnn.pad_sequence(words, batch_first=True) if self.with_words else None

    def _encode(self, texts: Sequence[str], rows: Tensor | None) -> tuple[Tensor, Tensor | None]:
        layout = self._layout(tuple(texts), rows)
        context = deep = None
        if rows is not None:
            # One set per phrase: phrase i refers to slots i M ... i M + M - 1 of one long context.
            flat = rows if rows.dim() == 3 else rows.transpose(0, 1).flatten(1, 2)
            context, deep = flat[0], flat[1:] if len(flat) > 1 else None
        if not self.with_words:
            return self.tower.encode(layout, context, deep), None
        words, features = self.tower.encode_words(layout, context, deep)
        return features, words

    def _layout(self, texts: tuple[str, ...], rows: Tensor | None) -> PromptLayout:
        count = 0 if rows is None else rows.shape[-2]
        own = rows is not None and rows.dim() == 4
        key = (texts, count, own)
        if key not in self._layouts:
            if len(self._layouts) >= _LAYOUTS:
                self._layouts.pop(next(iter(self._layouts)))
            sentences = [
                self.tower.sentence(*[slot(k + (i * count if own else 0)) for k in range(count)], text)
                for i, text in enumerate(texts)
            ]
            self._layouts[key] = self.tower.layout(sentences, texts)
        return self._layouts[key]
