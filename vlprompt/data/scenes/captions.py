"""Captions: sentences that are true of a scene, and the facts each of them states.

A fact is a short string such as ``"colour=red"``. :func:`facts` lists everything true of a spec, and
:func:`caption` returns a sentence together with the facts it states: a sentence fits another image
exactly when its facts are among that image's, so contrastive training never has to call a true sentence
false.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from vlprompt.data.scenes import wording
from vlprompt.data.scenes.attributes import COUNT_WORDS
from vlprompt.data.scenes.shapes import GLYPHS
from vlprompt.data.scenes.spec import SceneObject, SceneSpec, position_name, size_name
from vlprompt.data.scenes.wording import article, mend_articles, plural

__all__ = ["Caption", "arrangement", "caption", "facts", "larger", "phrase", "relation"]

T = TypeVar("T")
# How often captions of one attribute are about the shape, colour, pattern, size, position, background, style, kind.
_NATURAL = (7, 3, 3, 1, 1, 1, 1, 0.3)
_BALANCED = (6, 2, 5, 2, 3, 3, 1, 0.5)


@dataclass(frozen=True)
class Caption:
    """A sentence and the facts it states."""

    text: str
    facts: frozenset[str]


def facts(spec: SceneSpec) -> frozenset[str]:
    """Return everything that captions may say of a scene and that is true of it."""
    statements = {f"style={spec.style}", f"background={spec.background}", f"tone={_tone(spec)}"}
    statements.add(f"count={len(spec.objects)}")
    for attribute in ("shape", "colour", "pattern"):
        values = {getattr(o, attribute) for o in spec.objects}
        if len(values) == 1:
            statements.add(f"{attribute}={values.pop()}")

    if len(spec.objects) == 1:
        item = spec.objects[0]
        statements |= {f"kind={_kind(item)}", f"size={size_name(item)}", f"position={position_name(item)}"}

    if len(spec.objects) == 2:
        statements |= {f"object={o.colour} {o.shape}" for o in spec.objects}
        statements |= {
            f"relation={relation(spec)}",
            f"arrangement={arrangement(spec)}",
            f"larger={larger(spec)}",
        }

    return frozenset(f for f in statements if not f.endswith("=None"))


def relation(spec: SceneSpec) -> str | None:
    """Return ``"A left of B"`` or ``"A above B"`` for two objects, None when they lie askew."""
    first, second = spec.objects
    if arrangement(spec) is None:
        return None

    if arrangement(spec) == "side by side":
        left, right = sorted((first, second), key=lambda o: o.x)
        return f"{left.shape} left of {right.shape}"

    upper, lower = sorted((first, second), key=lambda o: o.y)
    return f"{upper.shape} above {lower.shape}"


def arrangement(spec: SceneSpec) -> str | None:
    """Return how two objects lie: ``"side by side"``, ``"one above the other"`` or None when askew."""
    first, second = spec.objects
    dx = abs(first.x - second.x)
    dy = abs(first.y - second.y)
    if max(dx, dy) < 2 * min(dx, dy):
        return None
    return "side by side" if dx > dy else "one above the other"


def larger(spec: SceneSpec) -> str | None:
    """Return the colour of the clearly larger of two objects, None when they are about equal."""
    small, big = sorted(spec.objects, key=lambda o: o.radius)
    return big.colour if big.radius > 1.4 * small.radius and big.colour != small.colour else None


def phrase(item: SceneObject, attributes: Sequence[str] = ("pattern", "colour")) -> str:
    """Name one object in canonical words, for example ``"striped red circle"``."""
    adjectives = [wording.words(a, getattr(item, a))[0] for a in attributes]
    return " ".join([*adjectives, wording.words("shape", item.shape)[0]])


def caption(
    spec: SceneSpec,
    rng: np.random.Generator,
    *,
    held_out: bool = False,
    simple: bool = False,
    balanced: bool = False,
) -> Caption:
    """Draw one sentence about a scene.

    Args:
        spec: The scene.
        rng: Source of randomness.
        held_out: Prefer words and sentences that pretraining never reads.
        simple: Of a single object, name its shape and perhaps its colour only.
        balanced: Say single attributes more often, the rarer ones above all.

    Returns:
        The sentence and its facts, all of them true of the scene.
    """
    writer = _Writer(spec, rng, held_out)
    if len(spec.objects) == 1 and simple:
        return writer.simple()

    if len(spec.objects) == 1:
        weights = _BALANCED if balanced else _NATURAL
        return writer.attribute(weights) if rng.random() < (0.65 if balanced else 0.45) else writer.single()

    shapes = {o.shape for o in spec.objects}
    if len(spec.objects) == 2 and len(shapes) == 2:
        return writer.pair()
    return writer.several()


class _Writer:
    """Draws the words of one caption."""

    def __init__(self, spec: SceneSpec, rng: np.random.Generator, held_out: bool) -> None:
        self.spec = spec
        self.rng = rng
        self.held_out = held_out
        self.stated: set[str] = set()

    def simple(self) -> Caption:
        """The shape of the only object, half of the time with its colour."""
        item = self.spec.objects[0]
        self.stated.add("count=1")
        noun = self.say("shape", item.shape)
        if self.rng.random() < 0.5:
            return self.finish(article(noun))
        return self.finish(f"a {self.say('colour', item.colour)} {noun}")

    def single(self) -> Caption:
        """A sentence about one object with several of its attributes."""
        item = self.spec.objects[0]
        self.stated.add("count=1")
        chance = self.rng.random(6)
        words_of_object = []
        if chance[0] < 0.3 and size_name(item):
            words_of_object.append(self.say("size", str(size_name(item))))

        if chance[1] < 0.5:
            words_of_object.append(self.say("pattern", item.pattern))

        if chance[2] < 0.7:
            words_of_object.append(self.say("colour", item.colour))

        words_of_object.append(self.say("shape", item.shape))
        noun = " ".join(words_of_object)
        text = (
            article(noun)
            if words_of_object[0] != words_of_object[-1] or item.shape not in GLYPHS
            else f"the {noun}"
        )

        if chance[3] < 0.25 and position_name(item):
            text += f" at the {self.say('position', str(position_name(item)))}"

        return self.finish(text + self.tail(chance[4], chance[5]))

    def tail(self, ground: float, style: float) -> str:
        """Perhaps a word on the ground or on the style."""
        if ground < 0.15:
            return f" on a {self.say('background', self.spec.background)}"
        if ground < 0.25:
            return f" on a {self.say('tone', _tone(self.spec))} background"
        if style < 0.2 and self.spec.style != "plain":
            return f" in a {self.say('style', self.spec.style)} picture"
        return ""

    def attribute(self, share: Sequence[float]) -> Caption:
        """A sentence about one attribute of the only object, or of the image."""
        item = self.spec.objects[0]
        values = {
            "shape": item.shape,
            "colour": item.colour,
            "pattern": item.pattern,
            "size": size_name(item),
            "position": position_name(item),
            "background": self.spec.background,
            "style": self.spec.style,
            "kind": _kind(item),
        }
        weights = np.array(share) * [v is not None for v in values.values()]
        name = list(values)[int(self.rng.choice(len(values), p=weights / weights.sum()))]
        word = self.say(name, str(values[name]))

        if name not in ("background", "style"):
            self.stated.add("count=1")

        if name == "shape" and item.shape in GLYPHS:
            sentence = self.pick(wording.GLYPH_SENTENCES)
            bare = word.split(" ", 1)[1]
            return Caption(sentence.format(word, bare=bare), frozenset(self.stated))

        sentence = self.pick(wording.SENTENCES[name]).format(word, a=article(word))
        return self.correct(sentence)

    def several(self) -> Caption:
        """A sentence about a number of like objects."""
        count = COUNT_WORDS[len(self.spec.objects) - 1]
        self.stated.add(f"count={len(self.spec.objects)}")
        true_facts = facts(self.spec)
        if self.rng.random() < 0.3:
            return Caption(self.pick(wording.COUNT_SENTENCES).format(count), frozenset(self.stated))

        words_of_group = [count]
        for attribute in ("pattern", "colour"):
            value = getattr(self.spec.objects[0], attribute)
            if f"{attribute}={value}" in true_facts and self.rng.random() < 0.6:
                words_of_group.append(self.say(attribute, value))

        shape = self.spec.objects[0].shape
        words_of_group.append(
            plural(self.say("shape", shape)) if f"shape={shape}" in true_facts else "objects"
        )
        return self.finish(" ".join(words_of_group) + self.tail(*self.rng.random(2)))

    def pair(self) -> Caption:
        """A sentence about two objects and how they lie."""
        first, second = (self.spec.objects[i] for i in self.rng.permutation(2))
        chance = self.rng.random()
        if chance < 0.15 and larger(self.spec):
            self.stated.add(f"larger={larger(self.spec)}")
            return Caption(f"the larger object is {larger(self.spec)}.", frozenset(self.stated))

        if chance < 0.3 and arrangement(self.spec):
            self.stated.add(f"arrangement={arrangement(self.spec)}")
            return self.finish(f"two objects {arrangement(self.spec)}")

        self.stated.add("count=2")
        if chance < 0.7 and (stated := relation(self.spec)):
            first, second = sorted((first, second), key=lambda o: o.x if "left" in stated else o.y)
            self.stated.add(f"relation={stated}")
            joint = self.pick(("to the left of", "left of") if "left" in stated else ("above", "on top of"))
        else:
            joint = "and"

        coloured = joint == "and" or self.rng.random() < 0.5
        return self.finish(f"{self.one_of_two(first, coloured)} {joint} {self.one_of_two(second, coloured)}")

    def one_of_two(self, item: SceneObject, coloured: bool) -> str:
        """Name one object of a pair."""
        noun = self.word("shape", item.shape)
        if not coloured:
            return article(noun)
        self.stated.add(f"object={item.colour} {item.shape}")
        return article(f"{self.word('colour', item.colour)} {noun}")

    def say(self, attribute: str, value: str) -> str:
        """State a fact and return a word for it."""
        self.stated.add(f"{attribute}={value}")
        return self.word(attribute, value)

    def word(self, attribute: str, value: str) -> str:
        """Return a word for a value: a held-out one where there is one and it is wanted."""
        unseen = wording.words(attribute, value, held_out=True) if self.held_out else ()
        usual = wording.words(attribute, value)
        if unseen:
            return self.pick(unseen)
        return usual[0] if self.rng.random() < 0.6 else self.pick(usual)

    def finish(self, text: str) -> Caption:
        """Put the phrase into a sentence."""
        prefix = self.pick(wording.HELD_OUT_PREFIXES if self.held_out else wording.PREFIXES)
        return self.correct(prefix.format(text))

    def correct(self, sentence: str) -> Caption:
        """Return the caption, its articles put right."""
        return Caption(mend_articles(sentence), frozenset(self.stated))

    def pick(self, options: Sequence[T]) -> T:
        """Draw one of several."""
        return options[int(self.rng.integers(len(options)))]


def _tone(spec: SceneSpec) -> str:
    return "dark" if spec.is_dark else "light"


def _kind(item: SceneObject) -> str:
    return "digit" if item.shape in GLYPHS else "geometric shape"
