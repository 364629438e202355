"""Words to search over: whole words of a tokenizer, thinned by clustering and by how much they change predictions.

Paper: Zhou et al., "Survival of the Most Influential Prompts: Efficient Black-Box Prompt Search via Clustering and
Pruning", Findings of EMNLP 2023, arXiv 2310.12774, section 3.

Where this differs from the published code: a representative is used once (the code's nearest words repeat), the
pruned list is never empty, influence is always the divergence, and words are judged beside the class name, as CLIP
reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import TypedDict

from vlprompt.core.errors import VLPromptError
from vlprompt.core.seeding import derive_seed
from vlprompt.text_search.embeddings import EmbeddingScorer
from vlprompt.text_search.phrases import PHRASES
from vlprompt.text_search.scorer import Scorer

__all__ = [
    "Site",
    "Source",
    "UnitOptions",
    "Words",
    "cluster_representatives",
    "found_units",
    "influence",
    "plain_words",
    "pruned",
    "unit_identity",
    "unit_template",
    "whole_template",
]

Source = Literal["words", "phrases"]
"""What units are: words of the tokenizer, or phrases of the grammar."""

Site = Literal["before", "behind", "both"]
"""Where units stand beside the class name."""

Words = tuple[str, ...]

_SHORTEST = 3  # letters
_CHUNK = 64  # templates whose probabilities are held at once
_LITTLE_WORDS = (
    "about after all also and any are because been but can could did does for from get had has have her here him his "
    "how into its just like more most not now off one only our out over said she should some such than that the their "
    "them then there these they this those through too two under very was way were what when where which while who why "
    "will with would you your http https www com rt via"
)
_STOP_WORDS = frozenset(_LITTLE_WORDS.split())
_READABLE = ("adjective", "medium", "place")


class UnitOptions(TypedDict, total=False):
    """Options of proposers that search over units.

    Attributes:
        source: ``"words"`` of the tokenizer or ``"phrases"`` of the grammar.
        site: Whether units stand before the class name, behind it, or on either side.
        length: Units of a template; the most, for greedy search.
        vocabulary: How many words of the tokenizer are looked at, the most frequent first.
        clusters: How many stand for them.
        percentile: Of influence; units strictly above it stay.
    """

    source: Annotated[Source, Field("words")]
    site: Annotated[Site, Field("before")]
    length: Annotated[int, Field(3, ge=1, le=12)]
    vocabulary: Annotated[int, Field(2000, ge=1)]
    clusters: Annotated[int, Field(200, ge=1)]
    percentile: Annotated[float, Field(80.0, ge=0, le=100)]


def unit_identity(options: UnitOptions) -> str:
    """Return a line of all options, for the identity of a proposer."""
    return (
        f"{options['source']} {options['site']} length={options['length']} vocabulary={options['vocabulary']} "
        f"clusters={options['clusters']} percentile={options['percentile']:g}"
    )


def found_units(scorer: Scorer, classnames: Sequence[str], seed: int, options: UnitOptions) -> list[str]:
    """Return what is searched over, the most influential first.

    Candidates are clustered by the text feature of "a photo of a {unit}.", one stands for each cluster, and those stay
    whose influence on the predictions is above a percentile.

    Args:
        scorer: Gives text features and class probabilities.
        classnames: C names, whose words are left out.
        seed: Of the clusters.
        options: All of them. Influence is measured at the site; before the class name for ``"both"``.

    Raises:
        VLPromptError: If there is none, or the scorer has no text features or probabilities.
    """
    units = _candidates(scorer, classnames, options["source"], options["vocabulary"])
    if not units:
        raise VLPromptError("the tokenizer has no whole words to search over; use source='phrases'.")

    features = scorer.features([f"a photo of a {unit}." for unit in units])
    chosen = [units[i] for i in cluster_representatives(features, options["clusters"], seed)]

    where: Site = "before" if options["site"] == "both" else options["site"]
    values = influence(scorer, [unit_template((unit,), (unit,), where) for unit in chosen])
    return [chosen[i] for i in pruned(values, options["percentile"])]


def _candidates(scorer: Scorer, classnames: Sequence[str], source: Source, vocabulary: int) -> list[str]:
    if source == "phrases":
        return [phrase for slot in _READABLE for phrase in PHRASES[slot] if phrase]
    if not isinstance(scorer, EmbeddingScorer):
        raise VLPromptError(f"{type(scorer).__name__} has no tokenizer; use source='phrases'.")
    return plain_words(scorer.vocabulary(), classnames, vocabulary)


def unit_template(before: Words, behind: Words, site: Site) -> str:
    """Return the sentence of units on the sides that count."""
    left = " ".join(before) if site in ("before", "both") else ""
    right = " ".join(behind) if site in ("behind", "both") else ""
    return " ".join(part for part in (left, "{}", right) if part) + "."


def whole_template(words: Words, site: Site) -> str:
    """Return the sentence of a sequence of units; the longer half stands before the class name for ``"both"``."""
    if site == "both":
        half = (len(words) + 1) // 2
        return unit_template(words[:half], words[half:], site)
    return unit_template(words, words, site)


def plain_words(vocabulary: Sequence[str], classnames: Sequence[str], count: int) -> list[str]:
    """Return the first words of a vocabulary that may stand in a template.

    Args:
        vocabulary: Whole words, the most frequent first.
        classnames: C names, whose words are left out.
        count: How many.
    """
    named = {word for name in classnames for word in name.casefold().split()}
    words = []
    for word in vocabulary:
        plain = word.isascii() and word.isalpha() and len(word) >= _SHORTEST
        if plain and word not in _STOP_WORDS and word not in named:
            words.append(word)
        if len(words) == count:
            break
    return words


def cluster_representatives(features: Tensor, clusters: int, seed: int) -> list[int]:
    """Return the rows that stand for the clusters of all rows: nearest to each centre, each row at most once.

    Args:
        features: (N, d).
        clusters: K; all rows if there are no more.
        seed: Of k-means++.
    """
    if len(features) <= clusters:
        return list(range(len(features)))

    from sklearn.cluster import KMeans  # takes a second, which no other proposer should wait for

    points = features.double().cpu().numpy()
    state = derive_seed(seed, "k-means of words") % (1 << 32)
    centres = KMeans(clusters, init="k-means++", n_init=1, random_state=state).fit(points).cluster_centers_

    taken: set[int] = set()
    representatives = []
    for centre in centres:
        distances = np.square(points - centre).sum(1)
        nearest = next(int(row) for row in np.argsort(distances, kind="stable") if int(row) not in taken)
        taken.add(nearest)
        representatives.append(nearest)
    return representatives


def influence(scorer: Scorer, templates: Sequence[str], plain: str = "{}.") -> Tensor:
    """Return (K,) mean divergences of the predictions with a template from those without words, in nats.

    KL(p(v) || p(empty)) for each sample, averaged over samples.

    Args:
        scorer: Gives class probabilities.
        templates: One for each word.
        plain: The template without words.
    """
    empty = scorer.probabilities([plain])[0].double().clamp_min(1e-12)
    parts = []
    for start in range(0, len(templates), _CHUNK):
        present = scorer.probabilities(templates[start : start + _CHUNK]).double().clamp_min(1e-12)
        parts.append((present * (present.log() - empty.log())).sum(-1).mean(-1).cpu())
    return torch.cat(parts)


def pruned(values: Tensor, percentile: float) -> list[int]:
    """Return the places of values strictly above their percentile, the largest first; never none.

    Args:
        values: (K,).
        percentile: In [0, 100].
    """
    border = float(np.percentile(values.numpy(), percentile))
    order = sorted(range(len(values)), key=lambda i: (-float(values[i]), i))
    return [i for i in order if float(values[i]) > border] or order[:1]
