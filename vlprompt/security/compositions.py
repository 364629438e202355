"""Images whose trigger and object are both known: which compositions are seen, and who may see which image.

The grid of (trigger, object) compositions is cut once, by a seed: every object is seen clean, every trigger with some
object and every object with some trigger, and a share of the triggered compositions is kept from training, half of
them for validation, half for testing. Images come from the splits of an ordinary data set, so no image is in two
phases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from PIL import Image

from vlprompt.core.errors import DataError, UnknownNameError
from vlprompt.core.seeding import numpy_rng
from vlprompt.data.base import ImageDataset, Reader, Sample
from vlprompt.learners.dbom import DEFAULT_TRIGGERS
from vlprompt.security.triggers import CLEAN, NATIVE_SIZE, TRIGGERS, create_trigger
from vlprompt.security.triggers.base import native

__all__ = [
    "DEFAULT_TRIGGERS",
    "CompositionDataset",
    "CompositionSource",
    "CompositionSplit",
    "check_triggers",
    "composition_dataset",
    "split_compositions",
]


@dataclass(frozen=True)
class CompositionSplit:
    """Which (trigger, object) compositions occur in which phase.

    Attributes:
        seen: (T, C), True where training may show a composition; row 0 (clean) is all True.
        unseen_val: (T, C), compositions that validation adds.
        unseen_test: (T, C), compositions that testing adds.
    """

    seen: np.ndarray[Any, np.dtype[np.bool_]]
    unseen_val: np.ndarray[Any, np.dtype[np.bool_]]
    unseen_test: np.ndarray[Any, np.dtype[np.bool_]]

    def allowed(self, split: str) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Return the (T, C) compositions that may occur in ``"train"``, ``"val"`` or ``"test"``."""
        added = {"val": self.unseen_val, "test": self.unseen_test}.get(split)
        return self.seen if added is None else self.seen | added


def split_compositions(triggers: int, objects: int, unseen: float = 0.3, seed: int = 1) -> CompositionSplit:
    """Cut the grid of compositions.

    Args:
        triggers: T, with clean.
        objects: C.
        unseen: Share of the (T - 1) C triggered compositions that training doesn't show, in [0, 1).
        seed: Another seed gives another cut.

    Raises:
        DataError: If the share is impossible, or so large that a trigger or an object would not be seen at all.
    """
    if not 0 <= unseen < 1 or triggers < 2 or objects < 2:
        raise DataError(
            f"compositions need at least one trigger, two objects and an unseen share in [0, 1); got {triggers - 1}, "
            f"{objects} and {unseen}."
        )
    wanted = round(unseen * (triggers - 1) * objects)
    seen = np.ones((triggers, objects), dtype=bool)
    hidden: list[tuple[int, int]] = []
    for pair in numpy_rng(seed, "pairs", triggers, objects).permutation((triggers - 1) * objects):
        t, c = 1 + int(pair) // objects, int(pair) % objects
        if len(hidden) < wanted and seen[t].sum() > 1 and seen[1:, c].sum() > 1:
            seen[t, c] = False
            hidden.append((t, c))
    if len(hidden) < wanted:
        raise DataError(
            f"{wanted} of {(triggers - 1) * objects} triggered compositions can't be kept from training: every "
            f"trigger and every object must be seen once, which leaves {len(hidden)}. Lower the unseen share."
        )
    val, test = np.zeros_like(seen), np.zeros_like(seen)
    for number, pair_ in enumerate(hidden):
        (val, test)[number % 2][pair_] = True
    return CompositionSplit(seen, val, test)


@dataclass(frozen=True)
class CompositionSource:
    """An image of another data set, which trigger is put into it, and what it shows."""

    base: Any
    trigger: int
    object: int


@dataclass(frozen=True)
class CompositionReader(Reader):
    """Reads images at the native size, with their triggers.

    Attributes:
        base: Reads the images themselves.
        triggers: Registry names; the first is clean.
        size: Native size in pixels.
        seed: Of the triggers.
    """

    base: Reader
    triggers: tuple[str, ...]
    size: int = NATIVE_SIZE
    seed: int = 1

    @cached_property
    def _built(self) -> tuple[Any, ...]:
        return (None, *(create_trigger(t, size=self.size, seed=self.seed) for t in self.triggers[1:]))

    def read(self, source: CompositionSource) -> Image.Image:
        """Return the image; a clean one is brought to the native size too, so that size tells nothing."""
        image, trigger = self.base.read(source.base), self._built[source.trigger]
        return Image.fromarray(native(image, self.size)) if trigger is None else trigger(image)

    def key(self, source: CompositionSource) -> str:
        """Return a string that changes when the pixels do."""
        name = self.triggers[source.trigger]
        return f"{self.base.key(source.base)}|{name}/{self.size}px/{self.seed}"

    def check(self, source: CompositionSource) -> str:
        """Return why the image can't be decoded, empty if it can."""
        return self.base.check(source.base)

    def stamp(self, source: CompositionSource) -> str:
        """See :meth:`Reader.stamp`."""
        name = self.triggers[source.trigger]
        return f"{self.base.stamp(source.base)}|{name}/{self.size}px/{self.seed}"


@dataclass(frozen=True)
class CompositionDataset(ImageDataset):
    """A data set whose label is the true object, and which knows every image's trigger.

    Attributes:
        triggers: Names; number 0 is clean.
        compositions: Which occur where.
    """

    triggers: tuple[str, ...] = DEFAULT_TRIGGERS
    compositions: CompositionSplit | None = field(default=None, repr=False)

    @property
    def trigger_labels(self) -> list[int]:
        """The trigger of every sample, 0 for clean."""
        return [s.source.trigger for s in self.samples]

    @property
    def targets(self) -> dict[str, list[int]]:
        """See :attr:`ImageDataset.targets`; with ``"trigger"``."""
        return {**super().targets, "trigger": self.trigger_labels}

    @property
    def strata(self) -> tuple[list[int], Sequence[str]]:
        """See :attr:`ImageDataset.strata`; one per pair that occurs, so shots count images per pair."""
        pairs = list(zip(self.trigger_labels, self.labels, strict=True))
        rank = {pair: number for number, pair in enumerate(sorted(set(pairs)))}
        return [rank[p] for p in pairs], [f"{self.triggers[t]} {self.classnames[c]}" for t, c in rank]


def composition_dataset(
    base: ImageDataset,
    triggers: Sequence[str] = DEFAULT_TRIGGERS,
    *,
    size: int = NATIVE_SIZE,
    seed: int = 1,
    unseen: float = 0.3,
    copies: int = 1,
) -> CompositionDataset:
    """Put triggers into one split of a data set: every image once clean and ``copies`` times triggered.

    An object's triggers are dealt to its images in turn, so that compositions of one object are equally frequent.

    Args:
        base: The images; its split says which compositions may occur.
        triggers: Names; the first must be ``"clean"``.
        size: Native size in pixels.
        seed: Of the triggers, of the cut into seen and unseen compositions, and of who gets which trigger.
        unseen: See :func:`split_compositions`.
        copies: Triggered images per image; at most as many as the object has triggers.

    Raises:
        DataError: If the list of triggers does not begin with clean, repeats or is too short; for impossible shares.
        UnknownNameError: For an unknown trigger.
    """
    names = check_triggers(triggers)
    if copies < 1:
        raise DataError(f"{base.name}: copies must be at least 1, got {copies}.")
    split = split_compositions(len(names), len(base.classnames), unseen, seed)
    allowed = split.allowed(base.split)
    samples: list[Sample] = []
    dealt = dict.fromkeys(range(len(base.classnames)), 0)
    queues = {
        c: numpy_rng(seed, "pairs of", base.split, c).permutation(np.flatnonzero(allowed[1:, c]) + 1)
        for c in dealt
    }
    for sample in base.samples:
        c = sample.classes[0]
        samples.append(Sample(CompositionSource(sample.source, 0, c), c))
        for _ in range(min(copies, len(queues[c]))):
            trigger = int(queues[c][dealt[c] % len(queues[c])])
            samples.append(Sample(CompositionSource(sample.source, trigger, c), c))
            dealt[c] += 1
    return CompositionDataset(
        name=f"triggered:{base.name}",
        split=base.split,
        samples=tuple(samples),
        classnames=base.classnames,
        templates=base.templates,
        reader=CompositionReader(base.reader, names, size, seed),
        info={
            **base.info,
            "triggers": list(names),
            "native_size": size,
            "pairs_seed": seed,
            "unseen": unseen,
        },
        triggers=names,
        compositions=split,
    )


def check_triggers(triggers: Sequence[str]) -> tuple[str, ...]:
    """Return the names of triggers as a tuple.

    Raises:
        DataError: If the first isn't clean, there is no other, or a name repeats.
        UnknownNameError: For a name no trigger has.
    """
    names = tuple(triggers)
    if len(names) < 2 or names[0] != CLEAN or len(set(names)) < len(names):
        raise DataError(
            f"a list of triggers begins with {CLEAN!r} and names each trigger once; got "
            f"{', '.join(map(str, names)) or 'none'}."
        )
    for name in names[1:]:
        for part in name.split("+"):
            if part not in TRIGGERS:
                raise UnknownNameError("trigger", part, [CLEAN, *TRIGGERS.names()])
    return names
