"""Search over single words that were clustered and pruned (ClaPS): greedy or genetic.

Paper: Zhou et al., Findings of EMNLP 2023, arXiv 2310.12774, section 3; see :mod:`vlprompt.text_search.units` for how
the words are found, and where that differs.

Where the search differs from the published code: the best of everything that was scored is kept (the code stores a
random member of the next population), a child has words of both parents (the code returns one parent unchanged), and
mutation reaches every place (the code never changes the first).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field
from typing_extensions import Unpack

from vlprompt.core.options import whole_options
from vlprompt.text_search.proposers import PROPOSERS
from vlprompt.text_search.proposers.base import Proposal, Proposer, Request
from vlprompt.text_search.scorer import Scorer
from vlprompt.text_search.units import (
    Site,
    UnitOptions,
    Words,
    found_units,
    unit_identity,
    unit_template,
    whole_template,
)

__all__ = ["Clusters"]

_TRIES = 20  # draws for each template that is wanted
_PARENT_SHARE = 0.1
_MUTATED_SHARE = 0.1  # of the words of a child


@PROPOSERS.register(
    "clusters", summary="words that were clustered and pruned, greedy or genetic (ClaPS)", paper="2310.12774"
)
class Clusters(Proposer):
    """Sequences of units beside the class name.

    Units are words of the tokenizer, or phrases of the grammar (``source="phrases"``, which keeps templates readable).
    They are clustered by the text feature of "a photo of a {unit}.", one stands for each cluster, and those stay whose
    influence on the predictions is above a percentile.

    Greedy: place after place, the unit with which the template is best. Genetic: ``population`` random sequences, then
    children of the best tenth, half of them mutants and half crossed.

    Args:
        algorithm: ``"greedy"`` or ``"genetic"``.
        population: Random sequences that genetic search begins with.
        options: Which units, how many and where, see :class:`UnitOptions`.

    Attributes:
        units: What is searched over, the most influential first.
    """

    def __init__(
        self,
        *,
        algorithm: Literal["greedy", "genetic"] = "greedy",
        population: Annotated[int, Field(ge=2)] = 64,
        **options: Unpack[UnitOptions],
    ) -> None:
        self.algorithm = algorithm
        self.options = whole_options(UnitOptions, options)
        self.site: Site = self.options["site"]
        self.length: int = self.options["length"]
        self.population = population
        self.units: list[str] = []
        self.identity = f"clusters {algorithm} {unit_identity(self.options)} population={population}"

    def prepare(self, scorer: Scorer, classnames: Sequence[str], seed: int) -> None:
        """See :meth:`Proposer.prepare`: find the units.

        Raises:
            VLPromptError: If there is none, or the scorer has no text features or probabilities.
        """
        self.units = found_units(scorer, classnames, seed, self.options)

    def propose(self, request: Request) -> Proposal:
        """See :meth:`Proposer.propose`."""
        return self._greedy(request) if self.algorithm == "greedy" else self._genetic(request)

    def _greedy(self, request: Request) -> Proposal:
        """Return what is not scored yet of the first place that is not complete."""
        scored = {candidate.template.casefold(): candidate for candidate in request.history}
        before: Words = ()
        behind: Words = ()

        for _ in range(self.length):
            options = self._longer(before, behind)
            texts = {unit_template(*option, self.site): option for option in options}
            new = [text for text in texts if text.casefold() not in request.seen]
            if new:
                return Proposal(new[: request.count])

            known = [scored[text.casefold()] for text in texts if text.casefold() in scored]
            if not known:
                break
            best = min(known, key=lambda candidate: candidate.rank(request.objective))
            before, behind = next(
                option for text, option in texts.items() if text.casefold() == best.template.casefold()
            )
        return Proposal((), exhausted=True)

    def _longer(self, before: Words, behind: Words) -> list[tuple[Words, Words]]:
        """Return all sequences with one more unit."""
        options = []
        if self.site in ("before", "both"):
            options += [((*before, unit), behind) for unit in self.units]
        if self.site in ("behind", "both"):
            options += [(before, (*behind, unit)) for unit in self.units]
        return options

    def _genetic(self, request: Request) -> Proposal:
        """Return random sequences until there is a population, then children of the best."""
        known = self._sequences(request)
        parents = known[: max(2, int(_PARENT_SHARE * len(known)))]
        texts: list[str] = []
        taken = set(request.seen)

        for _ in range(_TRIES * request.count):
            if len(texts) == request.count:
                break
            if len(known) + len(texts) < self.population or len(parents) < 2:
                words = tuple(self._unit(request.rng) for _ in range(self.length))
            elif request.rng.random() < 0.5:
                words = self.mutated(parents[int(request.rng.integers(len(parents)))], request.rng)
            else:
                first, second = request.rng.choice(len(parents), size=2, replace=False)
                words = crossed(parents[int(first)], parents[int(second)], request.rng)

            text = whole_template(words, self.site)
            if text.casefold() not in taken:
                taken.add(text.casefold())
                texts.append(text)
        return Proposal(texts, exhausted=not texts)

    def mutated(self, words: Words, rng: np.random.Generator) -> Words:
        """Return a sequence with a tenth of its units replaced, one at least; every place may be hit."""
        count = max(1, round(_MUTATED_SHARE * len(words)))
        places = set(rng.choice(len(words), size=count, replace=False).tolist())
        return tuple(self._unit(rng) if i in places else word for i, word in enumerate(words))

    def _unit(self, rng: np.random.Generator) -> str:
        return self.units[int(rng.integers(len(self.units)))]

    def _sequences(self, request: Request) -> list[Words]:
        """Return the sequences of units among the scored templates, the best first."""
        sequences = []
        for candidate in request.history:
            before, _, behind = candidate.template.partition("{}")
            text = f"{before} {behind.removesuffix('.')}"
            words = _split(" ".join(text.split()), self.units)
            if words is not None and len(words) == self.length:
                sequences.append(words)
        return sequences


def crossed(first: Words, second: Words, rng: np.random.Generator) -> Words:
    """Return a child with units of both parents at their places; parents of one unit give one of the two."""
    if len(first) < 2:
        return first if rng.random() < 0.5 else second
    picks = rng.integers(2, size=len(first))
    if picks.min() == picks.max():  # all of one parent: take one place from the other
        place = int(rng.integers(len(picks)))
        picks[place] = 1 - picks[place]
    return tuple((first, second)[pick][place] for place, pick in enumerate(picks))


def _split(text: str, units: Sequence[str]) -> Words | None:
    """Return text as a sequence of units, the longest first; None if it is none."""
    ordered = sorted(units, key=len, reverse=True)
    words: list[str] = []
    rest = text
    while rest:
        unit = next((unit for unit in ordered if rest == unit or rest.startswith(f"{unit} ")), None)
        if unit is None:
            return None
        words.append(unit)
        rest = rest[len(unit) :].lstrip()
    return tuple(words)
