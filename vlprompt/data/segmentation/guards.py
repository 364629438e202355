"""What makes a segmentation result worthless: images that two splits share, and label leakage through phrases."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from vlprompt.core.errors import DataError
from vlprompt.data.segmentation.base import MaskDataset, MaskSample

__all__ = ["denies", "label_leaks", "long_phrases", "overlaps", "pair_problems", "without_shared"]

_DENIAL = re.compile(
    r"^\s*(?:an?\s+(?:image|picture|photo)\s+(?:of|with)\s+)?(?:no|without|normal|absence of)\b", re.I
)


def denies(phrase: str) -> bool:
    """Return whether a phrase says itself that there is nothing to find, for example ``"no polyp"``."""
    return bool(_DENIAL.match(phrase))


def without_shared(samples: Iterable[MaskSample], others: Iterable[MaskSample]) -> tuple[MaskSample, ...]:
    """Return the samples whose images don't lie in the other splits too, by their names."""
    taken = {s.source for s in others}
    return tuple(s for s in samples if s.source not in taken)


def overlaps(splits: Mapping[str, MaskDataset]) -> dict[tuple[str, str], list[tuple[Any, Any]]]:
    """Find images of equal content in two splits, whatever they are called.

    Args:
        splits: Split to data set; every image is read once.

    Returns:
        Pairs of splits to pairs of sources; empty if nothing is shared.
    """
    sources: dict[str, dict[str, Any]] = {}  # split -> key of the content -> source
    for split, data in splits.items():
        sources[split] = {data.reader.key(source): source for source in data.images()}

    shared = {}
    for first, second in itertools.combinations(splits, 2):
        keys = [key for key in sources[first] if key in sources[second]]
        if keys:
            shared[first, second] = [(sources[first][key], sources[second][key]) for key in keys]
    return shared


def label_leaks(data: MaskDataset) -> dict[str, int]:
    """Find label leakage: phrases of a class whose masks are all empty, while its other phrases have masks.

    A model that learns such a phrase is right without looking at the image, and an empty mask that is predicted
    counts as a perfect one. Every mask is read.

    Returns:
        Phrase to the number of its pairs; empty if no phrase leaks the label.
    """
    full: dict[tuple[int, str], list[bool]] = {}
    for index, sample in enumerate(data.samples):
        mask = data[index].mask
        full.setdefault((sample.label, sample.phrase), []).append(bool((mask == 1).any()))

    visible = {label for (label, _), hits in full.items() if any(hits)}
    return {phrase: len(hits) for (label, phrase), hits in full.items() if not any(hits) and label in visible}


def long_phrases(
    data: MaskDataset, tokens: Callable[[str], int], most: int = 77
) -> dict[str, tuple[int, int]]:
    """Find phrases that no text tower of CLIP's kind reads to their end; a run with them stops.

    Args:
        data: The pairs.
        tokens: Returns how many tokens a phrase takes, with those of start and end.
        most: The longest sentence in tokens.

    Returns:
        Phrase to its tokens and to the number of its pairs.
    """
    counts = Counter(sample.phrase for sample in data.samples)
    lengths = {phrase: tokens(phrase) for phrase in counts}
    return {phrase: (length, counts[phrase]) for phrase, length in lengths.items() if length > most}


def pair_problems(data: MaskDataset, indices: Iterable[int] | None = None) -> list[str]:
    """Read every pair once and return a sentence for each that can't be used."""
    problems = []
    for index in range(len(data)) if indices is None else indices:
        try:
            _ = data[index]
        except DataError as error:
            problems.append(str(error))
    return problems
