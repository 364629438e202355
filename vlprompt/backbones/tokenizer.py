"""One face for the tokenizers of CLIP-family text towers: inner tokens, start, end and padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from open_clip.tokenizer import basic_clean, canonicalize_text
from torch import Tensor

__all__ = ["TextTokenizer", "irregularity", "whole_words", "wrap_tokenizer"]

_PROBE = "a dog"
_END_OF_WORD = "</w>"  # in CLIP's byte pairs
_BEGINNINGS = ("\u0120", "\u2581")  # of a word, in the vocabularies of transformers
_MODE_WITH_CLASS_TOKEN = "clips"  # open_clip's name of it


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
    """open_clip's SimpleTokenizer (CLIP's BPE); cleaning and additional special tokens are its own."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.start = [tokenizer.sot_token_id]
        self.end = [tokenizer.eot_token_id]
        self.pad = 0
        self.context_length = tokenizer.context_length
        self.irregular = ""
        if tokenizer.reduction_fn is not None:
            self.irregular = (
                "its tokenizer shortens long texts by leaving out words by chance (reduction_mask)."
            )

    def encode(self, text: str) -> list[int]:
        return [int(i) for i in self._tokenizer.encode(text)]

    def rows(self, texts: Sequence[str], length: int) -> Tensor:
        return self._tokenizer(list(texts), context_length=length)

    def words(self) -> list[str]:
        """Return the words that are one token, in the order of their ids: those of early merges are frequent."""
        ordered = sorted(self._tokenizer.encoder.items(), key=lambda pair: pair[1])
        return [token.removesuffix(_END_OF_WORD) for token, _ in ordered if token.endswith(_END_OF_WORD)]


class _HuggingFace:
    """A tokenizer of transformers (SigLIP, mT5, BERT towers), by itself or inside open_clip's HFTokenizer.

    Special tokens are read off an encoded probe, so those of a language that was set are among them.

    Args:
        inner: The tokenizer of transformers.
        clean: What is done to a text before.
        make_rows: Texts and a length to (N, length) ids; None: as transformers pads and cuts.
        strip: An id that the model sees as 0 wherever it stands (open_clip's ``strip_sep_token``).
        mode: open_clip's ``tokenizer_mode``.
        context_length: Of open_clip's wrapper.
    """

    def __init__(
        self,
        inner: Any,
        clean: Callable[[str], str],
        make_rows: Callable[[list[str], int], Any] | None = None,
        strip: int | None = None,
        mode: str = "",
        context_length: int | None = None,
    ) -> None:
        self._inner = inner
        self._clean = clean
        self._rows = make_rows or self._padded
        self._strip = strip
        self.context_length = context_length
        self.pad = self._seen([inner.pad_token_id if inner.pad_token_id is not None else 0])[0]

        bare = self.encode(_PROBE)
        full = self._seen(list(inner(clean(_PROBE)).input_ids))
        first = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), None)
        self.start = [] if first is None else full[:first]
        self.end = [] if first is None else full[first + len(bare) :]
        self.irregular = self._irregularity(first is None, mode)

    def encode(self, text: str) -> list[int]:
        return self._seen(list(self._inner(self._clean(text), add_special_tokens=False).input_ids))

    def rows(self, texts: Sequence[str], length: int) -> Tensor:
        return torch.as_tensor(self._rows(list(texts), length))

    def words(self) -> list[str]:
        """Return the words that are one token, in the order of their ids."""
        ordered = sorted(self._inner.get_vocab().items(), key=lambda pair: pair[1])
        return [token[1:] for token, _ in ordered if token.startswith(_BEGINNINGS)]

    def _seen(self, ids: list[int]) -> list[int]:
        """Return ids as the model sees them."""
        return [0 if i == self._strip else int(i) for i in ids]

    def _padded(self, texts: list[str], length: int) -> Tensor:
        cleaned = [self._clean(text) for text in texts]
        return self._inner(
            cleaned, return_tensors="pt", max_length=length, padding="max_length", truncation=True
        ).input_ids

    def _irregularity(self, without_words: bool, mode: str) -> str:
        if mode == _MODE_WITH_CLASS_TOKEN:
            return "its tokenizer puts a class token behind the padding (tokenizer_mode clips)."
        if self._inner.padding_side != "right":
            return "its tokenizer puts the padding before the words."
        return "its tokenizer merges words with special tokens." if without_words else ""


def wrap_tokenizer(tokenizer: Any) -> TextTokenizer:
    """Return a :class:`TextTokenizer` for tokenizers of open_clip and transformers, or one that already is one."""
    if hasattr(tokenizer, "sot_token_id"):
        return _BytePair(tokenizer)
    if hasattr(tokenizer, "tokenizer"):
        return _wrap_open_clip(tokenizer)
    if hasattr(tokenizer, "add_special_tokens") and hasattr(tokenizer, "pad_token_id"):
        return _HuggingFace(tokenizer, clean=str)
    return tokenizer


def irregularity(tokenizer: TextTokenizer | None) -> str:
    """Return why a row is not always start, words, end and padding, as a sentence; empty if it is."""
    return tokenizer.irregular if isinstance(tokenizer, (_BytePair, _HuggingFace)) else ""


def whole_words(tokenizer: TextTokenizer) -> list[str]:
    """Return the words that a tokenizer reads as one token, the most frequent first; empty if it does not say."""
    return tokenizer.words() if isinstance(tokenizer, (_BytePair, _HuggingFace)) else []


def _wrap_open_clip(tokenizer: Any) -> TextTokenizer:
    """Wrap open_clip's HFTokenizer or SigLipTokenizer, which has no options but cleans in a way of its own."""
    inner = tokenizer.tokenizer
    return _HuggingFace(
        inner,
        getattr(tokenizer, "clean_fn", _clean_siglip),
        lambda texts, length: tokenizer(texts, context_length=length),
        inner.sep_token_id if getattr(tokenizer, "strip_sep_token", False) else None,
        getattr(tokenizer, "tokenizer_mode", ""),
        tokenizer.context_length,
    )


def _clean_siglip(text: str) -> str:
    return canonicalize_text(basic_clean(text))
