"""Templates from captions: what people say of such images, around the class name.

The first stage of RAPO++ (Gao et al. 2025) retrieves modifiers for prompts of video generators; this is what carries
over to classification. Offline where captions are, as those of the embedded scenes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from vlprompt.data.captions import open_captions
from vlprompt.text_search.proposers import PROPOSERS
from vlprompt.text_search.proposers.base import Proposal, Proposer, Request
from vlprompt.text_search.scorer import Scorer
from vlprompt.text_search.templates import masked, normalised

__all__ = ["Retrieval", "mined_templates"]

_PLACE = re.compile(
    r"\b(?:above|against|at|behind|below|beside|in|inside|near|on|over|under|with|without)\b[^.,;]*"
)
_MOST_WORDS = 12


@PROPOSERS.register("retrieval", summary="what captions say around class names and of places; offline")
class Retrieval(Proposer):
    """Templates mined from captions, those first that are most like the descriptions of the images.

    A caption that holds a class name once becomes a template; of the others, what follows a preposition becomes an
    ending of "a photo of a {} ...". Without descriptions the most frequent come first.

    Args:
        captions: ``scenes:COUNT``, ``folder:PATH``, ``csv:PATH`` or ``tar:PATTERN``, as meta-training reads them.
        most: Captions that are read.
    """

    reads_notes = True

    def __init__(self, *, captions: str = "scenes:500", most: Annotated[int, Field(ge=1)] = 2000) -> None:
        self.captions = captions
        self.most = most
        self.identity = f"retrieval {captions} most={most}"
        self._templates: list[str] = []
        self._scorer: Scorer | None = None

    def prepare(self, scorer: Scorer, classnames: Sequence[str], seed: int) -> None:
        """See :meth:`Proposer.prepare`: read the captions."""
        source = open_captions(self.captions)
        texts = [source.caption(index) for index in range(min(self.most, len(source)))]
        self._templates = mined_templates(texts, classnames)
        self._scorer = scorer

    def propose(self, request: Request) -> Proposal:
        """See :meth:`Proposer.propose`."""
        new = [text for text in self._ordered(request.notes) if text.casefold() not in request.seen]
        return Proposal(new[: request.count], exhausted=len(new) <= request.count)

    def _ordered(self, notes: Sequence[str]) -> list[str]:
        """Return the templates, most like the notes first."""
        if not (notes and self._templates and self._scorer is not None):
            return self._templates

        wanted = self._scorer.features(list(notes)).mean(0)
        features = self._scorer.features([text.format("object") for text in self._templates])
        likeness = (features @ wanted).tolist()
        order = sorted(range(len(likeness)), key=lambda i: (-round(likeness[i], 6), i))
        return [self._templates[i] for i in order]


def mined_templates(captions: Sequence[str], classnames: Sequence[str]) -> list[str]:
    """Return templates out of captions, the most frequent first; see :class:`Retrieval`."""
    counts: Counter[str] = Counter()
    for caption in captions:
        text = masked(" ".join(caption.split()), classnames)
        if text.count("<CLASS>") == 1:
            mined = [text]
        else:
            mined = [f"a photo of a <CLASS> {place[0].strip()}" for place in _PLACE.finditer(text)]
        for template in mined:
            if template.count("<CLASS>") == 1 and len(template.split()) <= _MOST_WORDS:
                counts[normalised(template)] += 1
    return sorted(counts, key=lambda template: (-counts[template], template))
