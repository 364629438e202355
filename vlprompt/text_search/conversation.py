"""What a language model is told and asked, and how its reply is read.

The parts are those of IPO's instruction (arXiv 2410.15397, section 3.2): the task, what the images show, the best
templates so far with their figures in rising order, and the wish for others. The wording is ours.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import islice
from typing import Any

from vlprompt.text_search.proposers.base import Candidate, Request

__all__ = ["conversation", "parse_reply", "request_text"]

_TAG = re.compile(r"<template>(.*?)</template>", re.IGNORECASE | re.DOTALL)
_MOST_NOTES = 60
_NOTE_LENGTH = 300  # characters
_MOST_LISTS = 50  # beginnings of one that are looked at in a reply

_SYSTEM = (
    "You improve text templates for zero-shot image classification with a vision-language model such as CLIP. A "
    "template is one short English sentence that contains <CLASS> exactly once. For every class, <CLASS> is replaced "
    "by the class's name, and an image gets the class whose sentence is most similar to it."
)


def conversation(request: Request, history: int) -> list[dict[str, str]]:
    """Return the messages of a request.

    Args:
        request: What is asked, with all that is known.
        history: How many of the best candidates are shown.
    """
    parts = []
    if request.notes:
        notes = "\n".join(f"- {note[:_NOTE_LENGTH]}" for note in request.notes[:_MOST_NOTES])
        parts.append(f"What is known of the images, and of the mistakes of the best template:\n{notes}")

    shown = list(request.history[:history])[::-1]
    lines = "\n".join(map(_line, shown))
    parts.append(f"Templates so far, from the worst to the best:\n{lines}")
    parts.append(
        f"Write {request.count} new templates, all different from those above and from each other, that reach a lower "
        f"loss and a higher accuracy. Each has <CLASS> exactly once, at most 30 words, and names no class. Answer "
        f"with nothing but a JSON list of {request.count} strings."
    )
    return [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": "\n\n".join(parts)}]


def parse_reply(reply: str) -> list[str]:
    """Return the templates of a reply: the first JSON list of texts in it, or else what stands in template tags."""
    decoder = json.JSONDecoder()
    places = [match.start() for match in islice(re.finditer(r"\[", reply), _MOST_LISTS)]
    for place in places:
        try:
            value, _ = decoder.raw_decode(reply, place)
        except (ValueError, RecursionError):
            value = None
        texts = _texts(value)
        if texts:
            return texts
    return [text.strip() for text in _TAG.findall(reply) if text.strip()]


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list):
        return []
    return [text.strip() for text in value if isinstance(text, str) and text.strip()]


def _line(candidate: Candidate) -> str:
    template = candidate.template.replace("{}", "<CLASS>")
    score = candidate.score
    return f"{template}\n  loss {score.cross_entropy:.3f}, accuracy {100 * score.accuracy:.1f} %"


def request_text(messages: Sequence[dict[str, str]]) -> str:
    """Return messages as one text, for a transcript."""
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
