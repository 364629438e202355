"""Which sentences may be candidates: how they are written, and why one is refused."""

from __future__ import annotations

import re
from collections.abc import Sequence

from vlprompt.backbones import Backbone
from vlprompt.core.names import clean_classname

__all__ = ["LONGEST", "Rules", "masked", "normalised"]

LONGEST = 400
"""Characters of a template; a text tower of 77 tokens reads no more of ordinary words."""

_PLACEHOLDER = re.compile(r"[<\[{]\s*class(?:[ _]?name)?\s*[>\]}]", re.IGNORECASE)
_BULLET = re.compile(r"^\s*(?:[-*\u2022]|\d{1,3}[.)])\s+")


def normalised(text: str) -> str:
    """Return a proposal as a template: ``{}`` for the class, single spaces, no bullet, no quotes, a closing stop."""
    text = _PLACEHOLDER.sub("{}", _BULLET.sub("", text))
    text = " ".join(text.split()).strip("\"'`\u201c\u201d ")
    return text if not text or text[-1] in ".!?" else f"{text}."


def masked(text: str, classnames: Sequence[str]) -> str:
    """Return a text in which every class name is replaced by ``<CLASS>``, the longest names first."""
    for name in sorted(map(clean_classname, classnames), key=len, reverse=True):
        text = re.sub(_whole_words(name), "<CLASS>", text, flags=re.IGNORECASE)
    return text


class Rules:
    """What a template must be for a text tower and a list of classes.

    Args:
        backbone: Whose text tower reads it.
        classnames: C names.

    Raises:
        BackboneError: If the backbone has no tokenizer.
    """

    def __init__(self, backbone: Backbone, classnames: Sequence[str]) -> None:
        self.tokenizer = backbone.text.require_tokenizer()
        self.room = backbone.text.context_length - len(self.tokenizer.start) - len(self.tokenizer.end)

        names = [clean_classname(name) for name in classnames]
        self.longest = max(names, key=lambda name: len(self.tokenizer.encode(name)))
        self._names = [(name, re.compile(_whole_words(name), re.IGNORECASE)) for name in names]

    def tokens(self, template: str) -> int:
        """Return the tokens of a template without the class name."""
        return len(self.tokenizer.encode(template.replace("{}", " ")))

    def problem(self, template: str) -> str:
        """Return why a normalised template is refused, empty if it is not."""
        if not template.replace("{}", "").strip(" .!?"):
            return "blank"
        if "{}" not in template:
            return "the place of the class name is missing"
        if template.count("{}") > 1:
            return "the class name stands in it twice"
        if set(template.replace("{}", "")) & set("{}<>"):
            return "it holds a brace or a tag"
        if not template.isprintable():
            return "it holds a sign that is not seen: half a character, a control character, a change of direction"
        if template.startswith("#"):
            return "it begins with #, which stands for a remark in a file of templates"
        if len(template) > LONGEST:
            return f"longer than {LONGEST} characters"

        words = template.replace("{}", "\x1f")
        for name, pattern in self._names:
            if pattern.search(words):
                return f"it holds the class name {name!r}"

        tokens = len(self.tokenizer.encode(template.format(self.longest)))
        if tokens > self.room:
            return f"with the class {self.longest!r} it has {tokens} tokens, the text tower reads {self.room}"
        return ""


def _whole_words(name: str) -> str:
    return rf"(?<!\w){re.escape(name)}(?!\w)"
