"""Words and sentences of captions; the ones in ``HELD_OUT_*`` never occur in pretraining."""

from __future__ import annotations

import re

from vlprompt.data.scenes.attributes import COLOURS, PATTERNS
from vlprompt.data.scenes.shapes import GLYPHS, SHAPES

__all__ = ["HELD_OUT_WORDS", "article", "mend_articles", "plural", "words"]

_VOWEL = re.compile(r"\ba (?=(?!uni)[aeiou])")

#: Ways to say an attribute's value, the canonical one first. Values that are missing are said as they are.
WORDS: dict[str, dict[str, tuple[str, ...]]] = {
    "shape": {
        **{
            name: (f"digit {name}", f"number {name}", f"digit {i}", f"number {i}")
            for i, name in enumerate(GLYPHS)
        },
        "oval": ("oval", "ellipse"),
        "cross": ("cross", "plus sign"),
        "crescent": ("crescent", "crescent moon"),
        "teardrop": ("teardrop", "drop"),
        "lightning": ("lightning bolt", "lightning"),
        "semicircle": ("semicircle", "half circle"),
    },
    "colour": {},
    "pattern": {
        "solid": ("solid", "uniform"),
        "striped": ("striped", "stripy"),
        "dotted": ("dotted", "polka dot"),
        "checkered": ("checkered", "checked"),
        "gradient": ("gradient", "fading"),
        "outlined": ("outlined", "hollow"),
        "split": ("split", "two-tone"),
    },
    "background": {
        "plain": ("plain background", "empty background"),
        "gradient": ("gradient background", "smooth gradient background"),
        "grainy": ("grainy background", "rough background"),
        "grid": ("grid background", "background with a grid"),
        "diagonal": ("diagonal background", "background of diagonal lines"),
        "spotted": ("spotted background", "background with spots"),
    },
    "style": {
        "plain": ("clean", "sharp"),
        "noisy": ("noisy",),
        "blurred": ("blurred", "blurry", "out of focus"),
        "night": ("night", "dark"),
        "pixelated": ("pixelated", "low resolution"),
        "sketch": ("sketch", "pencil"),
        "inverted": ("inverted", "negative"),
    },
    "size": {"small": ("small", "little"), "medium": ("medium", "medium-sized"), "large": ("large", "big")},
    "position": {"center": ("center", "middle")},
}

#: Synonyms that pretraining never reads: value -> words.
HELD_OUT_WORDS: dict[str, dict[str, tuple[str, ...]]] = {
    "shape": {"circle": ("disc",), "ring": ("hoop",), "diamond": ("rhombus",), "flower": ("blossom",)},
    "colour": {
        "red": ("crimson",),
        "purple": ("violet",),
        "turquoise": ("cyan",),
        "gray": ("grey",),
        "yellow": ("golden",),
    },
    "pattern": {"dotted": ("speckled",), "striped": ("banded",), "outlined": ("contoured",)},
    "background": {"spotted": ("backdrop with dots",)},
    "style": {"blurred": ("unfocused",), "night": ("nocturnal",)},
    "size": {"small": ("tiny",), "large": ("huge",)},
    "position": {},
}

PREFIXES: tuple[str, ...] = (
    "a photo of {}.",
    "a picture of {}.",
    "an image of {}.",
    "{}.",
    "this is {}.",
    "there is {}.",
)
HELD_OUT_PREFIXES: tuple[str, ...] = ("we can see {}.", "a rendering of {}.", "the artist drew {}.")

#: Sentences about one attribute of a single object; ``{}`` is the value's word.
SENTENCES: dict[str, tuple[str, ...]] = {
    "shape": (
        "a photo of {a}.",
        "a picture of {a}.",
        "the shape is {a}.",
        "{a}.",
        "a photo of the {}.",
        "{}.",
    ),
    "colour": (
        "a photo of a {} object.",
        "a {} object.",
        "the color is {}.",
        "something {}.",
        "a {} shape.",
        "{}.",
    ),
    "pattern": ("a photo of a {} object.", "a {} object.", "the surface is {}.", "a {} pattern.", "{}."),
    "size": ("a photo of a {} object.", "a {} object.", "the object is {}.", "a {} shape."),
    "position": ("an object at the {}.", "the object is at the {}.", "a photo of an object at the {}."),
    "background": ("a {}.", "a photo with a {}.", "an object on a {}.", "there is a {}."),
    "style": ("a {} photo.", "a {} image.", "a {} picture of an object."),
    "kind": ("a photo of a {}.", "a {}.", "this is a {}."),
}
GLYPH_SENTENCES: tuple[str, ...] = (
    "a photo of the {}.",
    "the {}.",
    'a photo of the number: "{bare}".',
    "a photo of {bare}.",
    "{bare}.",
)
COUNT_SENTENCES: tuple[str, ...] = (
    "{} objects.",
    "a photo of {} objects.",
    "there are {} objects.",
    "{} shapes.",
)


def words(attribute: str, value: str, *, held_out: bool = False) -> tuple[str, ...]:
    """Return the ways to say a value.

    Args:
        attribute: For example ``"colour"``.
        value: For example ``"red"``.
        held_out: Return the wordings that pretraining never reads instead (possibly none).

    Returns:
        Words or short phrases, the canonical one first.
    """
    if held_out:
        return HELD_OUT_WORDS.get(attribute, {}).get(value, ())
    return WORDS.get(attribute, {}).get(value, (value,))


def article(phrase: str) -> str:
    """Put "a" or "an" before a phrase, or "the" before a digit's name."""
    if phrase.startswith(("digit ", "number ")):
        return f"the {phrase}"
    return f"{'an' if phrase[0] in 'aeiou' and not phrase.startswith('uni') else 'a'} {phrase}"


def mend_articles(sentence: str) -> str:
    """Turn "a" into "an" before a vowel."""
    return _VOWEL.sub("an ", sentence)


def plural(noun: str) -> str:
    """Return the plural of a noun phrase that is used for shapes; digits read "digits three"."""
    for kind in ("digit", "number"):
        if noun.startswith(kind + " "):
            return f"{kind}s {noun.split(' ', 1)[1]}"
    return noun + ("es" if noun.endswith(("s", "x", "sh", "ch")) else "s")


ALL_VALUES: dict[str, tuple[str, ...]] = {
    "shape": (*SHAPES, *GLYPHS),
    "colour": tuple(COLOURS),
    "pattern": PATTERNS,
}
