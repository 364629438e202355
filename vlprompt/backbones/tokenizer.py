"""One face for the tokenizers of CLIP-family text towers: inner tokens, start, end and padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["TextTokenizer", "wrap_tokenizer"]


class TextTokenizer(Protocol):
    """What a text tower asks of a tokenizer.

    Attributes:
        start: Ids before the words ([] if the model has none).
        end: Ids after the words.
        pad: Id that fills a row.
        context_length: Tokens of a row, if the tokenizer knows.
    """

    start: list[int]
    end: list[int]
    pad: int
    context_length: int | None

    def encode(self, text: str) -> list[int]:
        """Return the ids of the words alone."""

    def rows(self, texts: Sequence[str], length: int) -> Tensor:
        """Return (N, length) padded rows, as the model's own pipeline makes them."""


class _BytePair:
    """open_clip's SimpleTokenizer (CLIP's BPE)."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.start = [tokenizer.sot_token_id]
        self.end = [tokenizer.eot_token_id]
        self.pad = 0
        self.context_length = tokenizer.context_length

    def encode(self, text: str) -> list[int]:
        return [int(i) for i in self._tokenizer.encode(text)]

    def rows(self, texts: Sequence[str], length: int) -> Tensor:
        return self._tokenizer(list(texts), context_length=length)


class _HuggingFace:
    """open_clip's HFTokenizer (SigLIP, mT5, BERT towers); special tokens are read off an encoded empty string."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        inner = tokenizer.tokenizer
        empty = list(inner("").input_ids)
        ends = {i for i in (inner.eos_token_id, inner.sep_token_id) if i is not None}
        self.end = [i for i in empty if i in ends]
        self.start = [i for i in empty if i not in ends]
        self.pad = inner.pad_token_id if inner.pad_token_id is not None else 0
        self.context_length = tokenizer.context_length

    def encode(self, text: str) -> list[int]:
        clean = self._tokenizer.clean_fn(text)
        return list(self._tokenizer.tokenizer(clean, add_special_tokens=False).input_ids)

    def rows(self, texts: Sequence[str], length: int) -> Tensor:
        return torch.as_tensor(self._tokenizer(list(texts), context_length=length))


def wrap_tokenizer(tokenizer: Any) -> TextTokenizer:
    """Return a :class:`TextTokenizer` for open_clip's tokenizers, or ``tokenizer`` itself if it already is one."""
    if hasattr(tokenizer, "sot_token_id"):
        return _BytePair(tokenizer)
    if hasattr(tokenizer, "tokenizer"):
        return _HuggingFace(tokenizer)
    return tokenizer
