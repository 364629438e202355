"""Every sentence about a single attribute, value by value: the classes that pretraining learns by name."""

from __future__ import annotations

from collections.abc import Iterable

from vlprompt.data.scenes import wording
from vlprompt.data.scenes.attributes import (
    BACKGROUNDS,
    COLOURS,
    COUNT_WORDS,
    HELD_OUT_STYLES,
    PATTERNS,
    POSITIONS,
    SIZES,
    STYLES,
)
from vlprompt.data.scenes.shapes import GLYPHS, SHAPES
from vlprompt.data.scenes.wording import article, mend_articles, words

__all__ = ["Sentences", "attribute_sentences"]

#: Attribute -> fact -> sentences.
Sentences = dict[str, dict[str, list[str]]]


def attribute_sentences() -> Sentences:
    """Return attribute -> fact -> sentences that state nothing but this fact, without held-out words and styles.

    Facts are those of :func:`vlprompt.data.scenes.captions.facts`, for example ``"colour=red"``.
    """
    plain = {
        "colour": COLOURS,
        "pattern": PATTERNS,
        "size": SIZES,
        "position": POSITIONS,
        "background": BACKGROUNDS,
        "style": [s for s in STYLES if s not in HELD_OUT_STYLES],
        "kind": ("digit", "geometric shape"),
    }
    sentences_of = {name: _filled_in(name, values, wording.SENTENCES[name]) for name, values in plain.items()}
    sentences_of["shape"] = {
        **_filled_in("shape", SHAPES, wording.SENTENCES["shape"]),
        **_filled_in("shape", GLYPHS, wording.GLYPH_SENTENCES),
    }
    sentences_of["count"] = {
        f"count={number}": [sentence.format(word) for sentence in wording.COUNT_SENTENCES]
        for number, word in enumerate(COUNT_WORDS, 1)
    }
    sentences_of["tone"] = {
        f"tone={tone}": [
            f"an object on a {tone} background.",
            f"a photo of an object on a {tone} background.",
        ]
        for tone in ("light", "dark")
    }
    sentences_of["arrangement"] = {
        f"arrangement={how}": [prefix.format(f"two objects {how}") for prefix in wording.PREFIXES]
        for how in ("side by side", "one above the other")
    }
    sentences_of["larger"] = {f"larger={colour}": [f"the larger object is {colour}."] for colour in COLOURS}

    return sentences_of


def _filled_in(attribute: str, values: Iterable[str], sentences: Iterable[str]) -> dict[str, list[str]]:
    """Put every word for every value into every sentence."""
    sentences_of = {
        value: [
            mend_articles(s.format(word, a=article(word), bare=word.split(" ", 1)[-1]))
            for s in sentences
            for word in words(attribute, value)
        ]
        for value in values
    }
    return {f"{attribute}={value}": list(dict.fromkeys(texts)) for value, texts in sentences_of.items()}
