"""Sentences of each class, beside the templates that are the same for all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vlprompt.core.errors import DataError
from vlprompt.core.names import class_key, clean_classname, listed_names

__all__ = ["Descriptions", "class_texts"]


class Descriptions(tuple[str, ...]):
    """Templates that carry sentences of single classes.

    As a sequence these are the hand-written templates, which a method that fills one of them reads as ever. Whatever
    averages sentences asks :func:`class_texts`, which gives each class its own.

    Args:
        templates: Sentences with one ``{}``.
        sentences: Class name to whole sentences; names match whatever their case and underscores.
        with_templates: Whether a class's sentences are its own and the filled templates, or its own alone.
    """

    sentences: Mapping[str, tuple[str, ...]]
    with_templates: bool

    def __new__(
        cls, templates: Iterable[str], sentences: Mapping[str, Sequence[str]], with_templates: bool = False
    ) -> Descriptions:
        """See the class."""
        self = super().__new__(cls, templates)
        self.sentences = {class_key(name): tuple(texts) for name, texts in sentences.items()}
        self.with_templates = with_templates
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:
        return tuple(self), dict(self.sentences), self.with_templates

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Descriptions) and self.__getnewargs__() == other.__getnewargs__()

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((tuple(self), tuple(sorted(self.sentences.items())), self.with_templates))

    def __repr__(self) -> str:
        return f"Descriptions{self.__getnewargs__()!r}"

    def texts(self, classname: str) -> tuple[str, ...]:
        """Return a class's sentences.

        Raises:
            DataError: If it has none; names some that have.
        """
        own = self.sentences.get(class_key(classname))
        if own is None:
            known = listed_names(self.sentences, most=5)
            raise DataError(f"the class {classname!r} has no descriptions; there are some of {known}.")
        filled = tuple(template.format(clean_classname(classname)) for template in self)
        return (*own, *filled) if self.with_templates else own


def class_texts(classname: str, templates: Sequence[str]) -> tuple[str, ...]:
    """Return the sentences that stand for a class: its own, or the filled templates."""
    if isinstance(templates, Descriptions):
        return templates.texts(classname)
    return tuple(template.format(clean_classname(classname)) for template in templates)
