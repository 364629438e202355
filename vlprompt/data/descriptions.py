"""Descriptions of classes: a JSON of sentences or descriptors, random words in their place, or a small grammar.

Papers: Pratt et al., "What does a platypus look like?" (CuPL), ICCV 2023, arXiv 2209.03320: whole sentences. Menon and
Vondrick, "Visual Classification via Description from Large Language Models" (DCLIP), ICLR 2023, arXiv 2210.07183:
descriptors. Roth et al., "Waffling around for Performance" (WaffleCLIP), ICCV 2023, arXiv 2306.07282: random words
reach about as much as descriptors, so a table with descriptions has them beside it.

No language model is asked, and nobody's descriptions are part of this package.
"""

from __future__ import annotations

import json
import logging
import os
import string
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from typing_extensions import Self

from vlprompt.core.descriptions import Descriptions
from vlprompt.core.errors import ConfigError, DataError
from vlprompt.core.names import class_key, clean_classname, listed_names
from vlprompt.core.options import describe_problems
from vlprompt.core.paths import user_path
from vlprompt.core.seeding import numpy_rng
from vlprompt.data.scenes.sentences import attribute_sentences
from vlprompt.data.scenes.wording import PREFIXES, article, mend_articles

__all__ = [
    "PUBLIC_DESCRIPTIONS",
    "DescriptionOptions",
    "descriptor_sentence",
    "waffle_sentences",
    "with_descriptions",
]

log = logging.getLogger("vlprompt.data")

PUBLIC_DESCRIPTIONS = (
    "whole sentences (CuPL): https://github.com/sarahpratt/CuPL, folder all_prompts; form: sentence",
    "descriptors (DCLIP): https://github.com/sachit-menon/classify_by_description_release, folder descriptors; form: "
    "descriptor",
    "neither repository has a licence, so ask before you pass them on",
)
"""Where public descriptions are; lines for people."""

_WAFFLE = "waffle"
_GRAMMAR = "grammar"

_WORDS = """
amber anchor apron arrow autumn basket beacon bell blanket bottle branch bridge bronze button candle canvas
carpet castle cellar chalk cherry circle cloud copper corner cotton cradle crystal curtain desert diamond drawer
dusty eager echo elbow ember engine fabric feather fence fiddle flannel forest fountain frozen gallop garden
gentle glass glove golden granite hammer harbor hollow honey iron island ivory jacket jolly kettle ladder
lantern leather lemon linen lively magnet maple marble meadow mellow mirror mitten narrow needle nimble ocean
orange oven paddle pebble pepper pillow planet pocket polish quiet quilt rabbit ribbon river rocket rugged
saddle sailor sandy shadow silver slender spoon spring stable stormy sugar summer sunny table tender thimble
thunder ticket timber tunnel velvet vessel violet wagon walnut whistle willow window winter wooden yellow zipper
"""


class DescriptionOptions(BaseModel):
    """What ``data.descriptions`` says; a text alone is the ``source``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(
        description="a JSON file, class to texts; waffle: random words, the control; grammar: sentences about names"
    )
    form: Literal["sentence", "descriptor"] = Field(
        "sentence", description="whole sentences (CuPL), or what follows 'NAME, which has' (DCLIP)"
    )
    with_templates: bool = Field(False, description="average the filled templates in, too")
    unmatched: Literal["refuse", "skip"] = Field(
        "refuse", description="skip: classes without texts have the templates, texts of no class are left out"
    )
    pairs: int = Field(15, ge=1, description="waffle: words and characters, so many of each")
    draw: int = Field(1, ge=0, description="waffle: which draw of the words; several show the spread")

    @model_validator(mode="after")
    def _check_used(self) -> Self:
        fields = type(self).model_fields
        values = self.model_dump()
        changed = {name for name, field in fields.items() if values[name] != field.default}
        drawn = {"pairs", "draw"} & changed
        read = {"form", "unmatched"} & changed
        if drawn and self.source != _WAFFLE:
            raise ValueError(f"{sorted(drawn)[0]!r} is of source waffle only.")
        if read and self.source in (_WAFFLE, _GRAMMAR):
            raise ValueError(f"{sorted(read)[0]!r} is of files only, not of {self.source}.")
        return self

    @staticmethod
    def of(value: Any) -> DescriptionOptions:
        """Return options from a text, a mapping, or what they are already.

        Raises:
            ConfigError: For unknown keys and bad values.
        """
        if isinstance(value, DescriptionOptions):
            return value
        content = {"source": os.fspath(value)} if isinstance(value, str | os.PathLike) else value
        try:
            return DescriptionOptions.model_validate(content)
        except ValidationError as error:
            raise ConfigError(describe_problems(error, DescriptionOptions), "descriptions") from error

    @property
    def path(self) -> str | None:
        """The file that is read; None if there is none."""
        return None if self.source in (_WAFFLE, _GRAMMAR) else self.source


def with_descriptions(
    templates: Sequence[str], classnames: Sequence[str], options: DescriptionOptions, name: str
) -> Descriptions:
    """Return a data set's templates with descriptions of its classes.

    Args:
        templates: Its hand-written sentences.
        classnames: All its classes.
        options: Where the descriptions come from.
        name: Of the data set, for messages.

    Raises:
        DataError: If the file is not what it should be; or if classes, or keys of the file, match nothing; names them.
    """
    if options.source == _WAFFLE:
        sentences = waffle_sentences(classnames, options.pairs, options.draw)
    elif options.source == _GRAMMAR:
        sentences = {classname: _about(classname) for classname in classnames}
    else:
        sentences = _matched(_read(options.source), templates, classnames, options, name)
    return Descriptions(templates, sentences, options.with_templates)


def descriptor_sentence(classname: str, descriptor: str) -> str:
    """Return ``"NAME, which has DESCRIPTOR."``, or ``which is``, or ``which``, as the descriptor begins.

    The rule is DCLIP's; there "a" stands for every word that begins with it, here for the article.
    """
    text = descriptor.strip().rstrip(".")
    first = text.split(" ", 1)[0].casefold()
    link = "which has"
    if first in ("a", "an", "used"):
        link = "which is"
    elif first in ("has", "often", "typically", "may", "can"):
        link = "which"
    return f"{classname}, {link} {text}."


def waffle_sentences(classnames: Sequence[str], pairs: int, seed: int) -> dict[str, list[str]]:
    """Return sentences with random words and random characters, the same ones for all classes.

    Each has as many words as class names have on average, and characters as many as their words have.

    Args:
        classnames: C names.
        pairs: So many with words, and so many with characters.
        seed: Of the draw.
    """
    words = [clean_classname(name).split() for name in classnames]
    count = max(1, round(float(np.mean([len(parts) for parts in words]))))
    length = max(1, round(float(np.mean([len(word) for parts in words for word in parts]))))

    rng = numpy_rng(seed, "waffle")
    texts = []
    for _ in range(pairs):
        texts.append(" ".join(rng.choice(_WORDS.split(), count)))
        texts.append(
            " ".join("".join(rng.choice(list(string.ascii_lowercase), length)) for _ in range(count))
        )
    return {name: [f"{clean_classname(name)}, which has {text}." for text in texts] for name in classnames}


def _about(classname: str) -> list[str]:
    """Return sentences about a name: with all words for what it names, where scenes have them, else in plain frames."""
    for by_fact in attribute_sentences().values():
        for fact, texts in by_fact.items():
            if class_key(fact.partition("=")[2]) == class_key(classname):
                return texts
    named = article(clean_classname(classname))
    return [mend_articles(prefix.format(named)) for prefix in PREFIXES]


def _read(source: str) -> dict[str, list[str]]:
    """Return class to texts of a JSON file.

    Raises:
        DataError: If it is no such file; says where.
    """
    path = user_path(source)
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DataError(f"descriptions: {source} can't be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"descriptions: {source} is not JSON: {error}.") from error

    if not isinstance(content, dict) or not content:
        raise DataError(
            f'descriptions: {source} is no mapping of classes to texts, such as {{"cat": ["a cat ..."]}}.'
        )
    for name, texts in content.items():
        if (
            not isinstance(texts, list)
            or not texts
            or not all(isinstance(t, str) and t.strip() for t in texts)
        ):
            raise DataError(
                f"descriptions: {source}: {name!r} needs a list of texts; got {str(texts)[:80]!r}."
            )
    return content


def _matched(
    content: Mapping[str, Sequence[str]],
    templates: Sequence[str],
    classnames: Sequence[str],
    options: DescriptionOptions,
    name: str,
) -> dict[str, list[str]]:
    """Return the sentences of every class of a data set."""
    by_key: dict[str, list[str]] = {}
    for key, of_key in content.items():
        by_key.setdefault(class_key(key), []).extend(of_key)

    missing = [classname for classname in classnames if class_key(classname) not in by_key]
    known = {class_key(classname) for classname in classnames}
    surplus = [key for key in content if class_key(key) not in known]
    if (missing or surplus) and options.unmatched == "refuse":
        parts = []
        if missing:
            parts.append(
                f"{len(missing)} of {len(classnames)} classes have no texts: {listed_names(missing)}"
            )
        if surplus:
            parts.append(f"{len(surplus)} keys name no class: {listed_names(surplus)}")
        raise DataError(
            f"descriptions: {options.source} does not fit {name}: {'; '.join(parts)}. Rename keys, or write unmatched: "
            "skip."
        )
    if missing or surplus:
        log.warning(
            "%s: %d classes without descriptions have the templates; texts of %d other names are left out",
            *(name, len(missing), len(surplus)),
        )

    sentences = {}
    for classname in classnames:
        texts = by_key.get(class_key(classname), [])
        named = clean_classname(classname)
        if not texts:
            sentences[classname] = [template.format(named) for template in templates]
        elif options.form == "descriptor":
            sentences[classname] = [descriptor_sentence(named, text) for text in texts]
        else:
            sentences[classname] = [text.strip() for text in texts]

    if options.form == "sentence":
        _warn_of_descriptors(sentences, options.source)
    return sentences


def _warn_of_descriptors(sentences: Mapping[str, Sequence[str]], source: str) -> None:
    """Say so if what should be whole sentences hardly ever names its class."""
    naming = [class_key(name) in class_key(text) for name, texts in sentences.items() for text in texts]
    if np.mean(naming) < 0.2:
        log.warning(
            "%s: %d of %d texts name their class; if they are descriptors, write form: descriptor.",
            *(source, sum(naming), len(naming)),
        )
