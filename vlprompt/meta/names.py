"""What to call a cluster of captions: a prompt classifies by name, so a pseudo-class needs one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

__all__ = ["pseudo_name", "shared_phrase"]

_WORD = re.compile(r"[^\W_]+(?:[-'][^\W_]+)*")
_LONGEST = 3  # words of a phrase
_CAPTION_WORDS = 12
# Words that a phrase neither begins nor ends with: they say nothing of what is seen.
_EMPTY = frozenset(
    """
    a an and another are as at be been being by can could for from has have he her here his i in into is it its it's me
    my no nor not of off on one's or our out over s shall she should so some such that the their them then there these
    they this those to under up us very was we were what when where which while who will with would you your
    photo photos photograph picture pictures image images drawing shot view object objects thing things item items see
    seen show shows showing shown
    """.split()  # noqa: SIM905 - a hundred quoted words would be no easier to read
)


def pseudo_name(
    captions: Sequence[str],
    policy: Literal["phrase", "caption", "pair"] = "phrase",
    shared: float = 0.3,
    outside: Sequence[str] = (),
) -> str:
    """Name a cluster.

    Args:
        captions: Of its pairs, the medoid's first.
        policy: ``phrase``: see :func:`shared_phrase`, or else as ``caption``: the medoid's, cut after 12 words.
            ``pair`` names a cluster like ``caption``; its pairs go by their own captions.
        shared: See :func:`shared_phrase`.
        outside: See there.
    """
    phrase = shared_phrase(captions, shared, outside) if policy == "phrase" else None
    return phrase or _cut(captions[0])


def shared_phrase(captions: Sequence[str], shared: float, outside: Sequence[str] = ()) -> str | None:
    """Return the longest phrase of up to three words that enough captions hold, None if there is none.

    It neither begins nor ends with a word that says nothing (articles, "photo", "object", ...). Of phrases of one
    length the one that is more frequent here than among ``outside`` wins, then the more frequent, then the alphabet.

    Args:
        captions: Of the cluster.
        shared: Share of the captions that must hold it.
        outside: Captions to stand out from.
    """
    inside = _phrases(captions)
    others = _phrases(outside)
    least = shared * len(captions)
    frequent = [p for p, n in inside.items() if n >= least]
    if not frequent:
        return None

    def rank(phrase: str) -> tuple[int, float, int, str]:
        lift = inside[phrase] / len(captions) - others[phrase] / max(len(outside), 1)
        return -len(phrase.split()), -lift, -inside[phrase], phrase

    return min(frequent, key=rank)


def _phrases(captions: Iterable[str]) -> Counter[str]:
    """Count the captions that hold each phrase."""
    counts: Counter[str] = Counter()

    for caption in captions:
        words = [word.lower() for word in _WORD.findall(caption)]
        phrases = set()
        for length in range(1, _LONGEST + 1):
            for start in range(len(words) - length + 1):
                last = start + length - 1
                if words[start] not in _EMPTY and words[last] not in _EMPTY:
                    phrases.add(" ".join(words[start : last + 1]))
        counts.update(phrases)

    return counts


def _cut(caption: str) -> str:
    words = caption.split()
    return " ".join(words[:_CAPTION_WORDS]).rstrip(" .,;:")
