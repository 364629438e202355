"""Images whose trigger and object are both known: which compositions are seen, and in which phase an image may occur.

A composition is a trigger and an object. The grid of compositions is cut once, by a seed: every object is seen clean,
every trigger with some object and every object with some trigger. A share of the triggered compositions is left out of
training: one half of it is for validation, the other for testing. Images come from the splits of an ordinary data set,
so no image is in two phases.
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
from vlprompt.data.triggers import (
    CLEAN,
    DEFAULT_TRIGGERS,
    NATIVE_SIZE,
    TRIGGERS,
    Trigger,
    create_trigger,
    size_label,
    size_of,
)
from vlprompt.data.triggers.base import native

__all__ = [
    "CompositionDataset",
    "CompositionReader",
    "CompositionSource",
    "CompositionSplit",
    "check_triggers",
    "composition_dataset",
    "split_compositions",
]

BoolTable = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True)
class CompositionSplit:
    """Which compositions of T triggers and C objects occur in which phase.

    Attributes:
        seen: (T, C), True where training may show a composition; row 0 (clean) is all True.
        unseen_val: (T, C), compositions that validation adds.
        unseen_test: (T, C), compositions that testing adds.
    """

    seen: BoolTable
    unseen_val: BoolTable
    unseen_test: BoolTable

    def allowed(self, split: str) -> BoolTable:
        """Return the (T, C) compositions that may occur in ``"train"``, ``"val"`` or ``"test"``."""
        if split == "val":
            return self.seen | self.unseen_val
        if split == "test":
            return self.seen | self.unseen_test
        return self.seen


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
    triggered = (triggers - 1) * objects
    wanted = round(unseen * triggered)
    seen = np.ones((triggers, objects), dtype=bool)
    hidden: list[tuple[int, int]] = []

    # The label "pairs" is part of the seed, so that cuts stay what they are.
    for number in numpy_rng(seed, "pairs", triggers, objects).permutation(triggered):
        trigger = 1 + int(number) // objects
        thing = int(number) % objects
        # A composition is hidden only if its trigger and its object are seen in another one.
        if len(hidden) < wanted and seen[trigger].sum() > 1 and seen[1:, thing].sum() > 1:
            seen[trigger, thing] = False
            hidden.append((trigger, thing))
    if len(hidden) < wanted:
        raise DataError(
            f"{wanted} of {triggered} triggered compositions can't be kept from training: every trigger and every "
            f"object must be seen once, which leaves {len(hidden)}. Lower the unseen share."
        )

    val = np.zeros_like(seen)
    test = np.zeros_like(seen)
    for composition in hidden[0::2]:
        val[composition] = True
    for composition in hidden[1::2]:
        test[composition] = True
    return CompositionSplit(seen, val, test)


@dataclass(frozen=True)
class CompositionSource:
    """An image of another data set, which trigger is put into it, and which object it shows."""

    base: Any
    trigger: int
    object: int


@dataclass(frozen=True)
class CompositionReader(Reader):
    """Reads images at the native size or their own, with their triggers.

    Attributes:
        base: Reads the images themselves.
        triggers: Registry names; the first is clean.
        size: Native size in pixels; None for every image's own.
        seed: Of the triggers.
    """

    base: Reader
    triggers: tuple[str, ...]
    size: int | None = NATIVE_SIZE
    seed: int = 1

    @cached_property
    def _triggers(self) -> tuple[Trigger | None, ...]:
        triggers = [create_trigger(name, size=self.size, seed=self.seed) for name in self.triggers[1:]]
        return (None, *triggers)

    def read(self, source: CompositionSource) -> Image.Image:
        """Return the image; a clean one is brought to the native size too, so that size tells nothing."""
        image = self.base.read(source.base)
        trigger = self._triggers[source.trigger]
        if trigger is None:
            return Image.fromarray(native(image, self.size))
        return trigger(image)

    def key(self, source: CompositionSource) -> str:
        """Return a string that changes when the pixels do."""
        return f"{self.base.key(source.base)}|{self._tampering(source)}"

    def check(self, source: CompositionSource) -> str:
        """Return why the image can't be decoded, empty if it can."""
        return self.base.check(source.base)

    def stamp(self, source: CompositionSource) -> str:
        """See :meth:`Reader.stamp`."""
        return f"{self.base.stamp(source.base)}|{self._tampering(source)}"

    def _tampering(self, source: CompositionSource) -> str:
        side = "own size" if self.size is None else f"{self.size}px"
        return f"{self.triggers[source.trigger]}/{side}/{self.seed}"


@dataclass(frozen=True)
class CompositionDataset(ImageDataset):
    """A data set whose label is the true object, and which knows every image's trigger.

    Attributes:
        triggers: T names; number 0 is clean.
        compositions: Which occur where.
    """

    triggers: tuple[str, ...] = DEFAULT_TRIGGERS
    compositions: CompositionSplit | None = field(default=None, repr=False)

    @property
    def native_size(self) -> int | None:
        """Pixels a side that every image has; None if images keep their own size."""
        return size_of(self.info["native_size"])

    @property
    def trigger_labels(self) -> list[int]:
        """The trigger of every sample, 0 for clean."""
        return [sample.source.trigger for sample in self.samples]

    @property
    def targets(self) -> dict[str, list[int]]:
        """See :attr:`ImageDataset.targets`; with ``"trigger"``."""
        return {**super().targets, "trigger": self.trigger_labels}

    @property
    def strata(self) -> tuple[list[int], Sequence[str]]:
        """See :attr:`ImageDataset.strata`: one per composition that occurs, so shots count images per composition."""
        compositions = list(zip(self.trigger_labels, self.labels, strict=True))
        ordered = sorted(set(compositions))
        rank = {composition: number for number, composition in enumerate(ordered)}
        names = [f"{self.triggers[trigger]} {self.classnames[thing]}" for trigger, thing in ordered]
        return [rank[composition] for composition in compositions], names


def composition_dataset(
    base: ImageDataset,
    triggers: Sequence[str] = DEFAULT_TRIGGERS,
    *,
    size: int | None = NATIVE_SIZE,
    seed: int = 1,
    unseen: float = 0.3,
    copies: int = 1,
) -> CompositionDataset:
    """Put triggers into one split of a data set: every image once clean and ``copies`` times triggered.

    The triggers of an object are dealt to its images in turn, so that compositions of one object are equally frequent.

    Args:
        base: The images; its split says which compositions may occur.
        triggers: Names; the first must be ``"clean"``.
        size: Native size in pixels; None to put triggers in at every image's own size.
        seed: Of the triggers, of the cut into seen and unseen compositions, and of which image gets which trigger.
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
    return CompositionDataset(
        name=f"triggered:{base.name}",
        split=base.split,
        samples=tuple(_deal(base, split.allowed(base.split), seed, copies)),
        classnames=base.classnames,
        templates=base.templates,
        reader=CompositionReader(base.reader, names, size, seed),
        info={
            **base.info,
            "triggers": list(names),
            "native_size": size_label(size),
            "compositions_seed": seed,
            "unseen": unseen,
        },
        triggers=names,
        compositions=split,
    )


def check_triggers(triggers: Sequence[str]) -> tuple[str, ...]:
    """Return the names of triggers as a tuple.

    Raises:
        DataError: If the first isn't clean, there is no other, or a name repeats.
        UnknownNameError: For a name that no trigger has.
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


def _deal(base: ImageDataset, allowed: BoolTable, seed: int, copies: int) -> list[Sample]:
    """Return the samples: each image clean, then with the next ``copies`` triggers of its object.

    Args:
        base: The images.
        allowed: (T, C), compositions that may occur.
        seed: Of the order of an object's triggers.
        copies: Triggered images per image.
    """
    queues = {}
    for thing in range(len(base.classnames)):
        triggers = np.flatnonzero(allowed[1:, thing]) + 1
        queues[thing] = numpy_rng(seed, "pairs of", base.split, thing).permutation(triggers)

    samples: list[Sample] = []
    dealt = dict.fromkeys(queues, 0)
    for sample in base.samples:
        thing = sample.classes[0]
        queue = queues[thing]
        samples.append(Sample(CompositionSource(sample.source, 0, thing), thing))
        for _ in range(min(copies, len(queue))):
            trigger = int(queue[dealt[thing] % len(queue)])
            samples.append(Sample(CompositionSource(sample.source, trigger, thing), thing))
            dealt[thing] += 1
    return samples
