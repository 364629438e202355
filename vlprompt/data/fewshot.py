"""Few-shot subsets and the base/new halves of a class list.

Paper: CoOp, 2109.01134, section 4.1 (1, 2, 4, 8, 16 shots, three seeds); CoCoOp, 2203.05557, section 4.1
(base/new). Differs from the reference: by default each class has a generator of its own, so a subset does not
depend on earlier draws of the process. ``coop_compat`` follows the single global stream of the reference, draw by
draw.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Sequence
from typing import Literal

from vlprompt.core.errors import DataError
from vlprompt.core.seeding import numpy_rng
from vlprompt.data.base import NO_LABEL, ImageDataset
from vlprompt.data.images import (
    BadImage,
    BadImagePolicy,
    SkipLimits,
    VerificationReport,
    refuse_if_fatal,
    verify,
)

__all__ = ["VAL_SHOTS", "base_new", "coop_indices", "few_shot"]

# The protocol tunes on at most so many validation images per class, however many it trains on.
VAL_SHOTS = 4
Sampling = Literal["private", "coop_compat"]


def few_shot(
    dataset: ImageDataset,
    shots: int,
    seed: int = 1,
    *,
    sampling: Sampling = "private",
    train: ImageDataset | None = None,
    strict_shots: bool = False,
    on_bad_image: BadImagePolicy = "error",
    max_bad_share: float = 0.05,
    max_bad_images: int = 0,
) -> ImageDataset:
    """Draw ``shots`` images per class without replacement; from ``val`` at most 4 (:data:`VAL_SHOTS`).

    Under ``"private"`` an unreadable image is replaced by the next of the class's shuffled list, so only
    the images that are looked at need decoding; under ``"coop_compat"`` it is left out.

    Args:
        dataset: The whole split.
        shots: Images per class, at least 1.
        seed: The protocol's seed.
        sampling: ``"private"``, or ``"coop_compat"`` for exactly the subset of the reference.
        train: The whole train split; ``coop_compat`` needs it for ``val``, whose draws follow train's in one
            stream.
        strict_shots: Refuse a class that has fewer than ``shots`` images, instead of taking all with a
            warning.
        on_bad_image: See :func:`vlprompt.data.images.drop_bad`.
        max_bad_share: Share of the whole split, in [0, 1].
        max_bad_images: See :func:`vlprompt.data.images.drop_bad`.

    Returns:
        The subset; ``info["indices"]`` holds the chosen positions in the whole split.

    Raises:
        DataError: For impossible ``shots``, unknown modes, too few images or unreadable ones, as
            configured.
    """
    wanted = _wanted(dataset, shots)
    strata, names = dataset.strata
    groups = _by_class(strata)
    _check_supply(dataset, names, groups, wanted, strict_shots)

    if sampling == "private":
        queues = _shuffled(dataset, groups, shots, seed)
    elif sampling == "coop_compat":
        queues = _reference_draws(dataset, train, shots, seed)
    else:
        raise DataError(f"unknown sampling {sampling!r}; known: 'private', 'coop_compat'.")

    chosen, bad = _take_readable(dataset, queues, wanted)
    report = VerificationReport(sum(map(len, chosen)) + len(bad), tuple(bad))
    limits = SkipLimits(max_bad_share, max_bad_images)
    refuse_if_fatal(dataset.name, dataset.split, report, on_bad_image, limits, len(dataset))
    indices = [i for group in chosen for i in group]
    info = {"skipped": [b.name for b in bad]} if bad else {}

    return dataset.subset(indices, shots=shots, seed=seed, sampling=sampling, indices=indices, **info)


def coop_indices(
    train_labels: Sequence[int], val_labels: Sequence[int], shots: int, seed: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Return the positions that the reference code would draw for train and for val, one list per class.

    One ``random.Random(seed)`` makes one ``sample`` per class in order of first appearance, train first, then
    val with ``min(shots, 4)``; a class with fewer images is taken whole and draws nothing.

    Reference: KaiyangZhou/Dassl.pytorch dassl/data/datasets/base_dataset.py, generate_fewshot_dataset.
    """
    stream = random.Random(seed)

    def draw(labels: Sequence[int], count: int) -> list[list[int]]:
        groups = _by_class(labels).values()
        return [stream.sample(g, count) if len(g) >= count else list(g) for g in groups]

    return draw(train_labels, shots), draw(val_labels, min(shots, VAL_SHOTS))


def base_new(dataset: ImageDataset, which: Literal["all", "base", "new"]) -> ImageDataset:
    """Keep the first ``ceil(C/2)`` classes (``"base"``) or the rest (``"new"``), relabelled from 0.

    Draw shots first and filter afterwards, so that base images are the same as in runs over all classes.

    Raises:
        DataError: For another ``which``, or if ``"new"`` would be empty.
    """
    count = len(dataset.classnames)
    middle = (count + 1) // 2
    if which == "all":
        return dataset
    if which not in ("base", "new"):
        raise DataError(f"{dataset.name}: unknown classes={which!r}; known: 'all', 'base', 'new'.")

    classes = range(middle) if which == "base" else range(middle, count)
    if not classes:
        raise DataError(f"{dataset.name}: it has {count} class, which leaves none for 'new'.")
    return dataset.keep_classes(classes, classes=which)


def _wanted(dataset: ImageDataset, shots: int) -> int:
    if isinstance(shots, bool) or not isinstance(shots, int) or shots < 1:
        raise DataError(
            f"{dataset.name}: shots must be a whole number of at least 1, or None for all; got {shots!r}."
        )
    return min(shots, VAL_SHOTS) if dataset.split == "val" else shots


def _by_class(labels: Sequence[int]) -> dict[int, list[int]]:
    """Return the positions of each label, labels in order of first appearance; images without one are no shots."""
    groups: dict[int, list[int]] = {}
    for position, label in enumerate(labels):
        if label != NO_LABEL:
            groups.setdefault(label, []).append(position)
    return groups


def _check_supply(
    dataset: ImageDataset, names: Sequence[str], groups: dict[int, list[int]], wanted: int, strict: bool
) -> None:
    short = [(c, len(groups.get(c, []))) for c in range(len(names)) if len(groups.get(c, [])) < wanted]
    if not short:
        return

    examples = ", ".join(f"{names[c]!r} has {n}" for c, n in short[:10])
    more = f", and {len(short) - 10} more" if len(short) > 10 else ""
    message = f"{dataset.name} ({dataset.split}): {wanted} shots asked for, but {examples}{more}."
    if strict:
        raise DataError(f"{message} Ask for at most {min(n for _, n in short)}, or pass strict_shots=False.")
    warnings.warn(f"{message} All of these are taken.", stacklevel=4)


def _shuffled(dataset: ImageDataset, groups: dict[int, list[int]], shots: int, seed: int) -> list[list[int]]:
    """Return one shuffled queue per class; each class has its own generator, so none depends on another."""
    key = dataset.info.get("fewshot_key", dataset.name)

    def shuffle(label: int) -> list[int]:
        order = numpy_rng(seed, "fewshot", key, dataset.split, shots, label).permutation(len(groups[label]))
        return [groups[label][i] for i in order]

    return [shuffle(label) for label in sorted(groups)]


def _reference_draws(
    dataset: ImageDataset, train: ImageDataset | None, shots: int, seed: int
) -> list[list[int]]:
    if dataset.split == "train":
        return coop_indices(dataset.labels, [], shots, seed)[0]
    if dataset.split != "val":
        raise DataError(
            f"{dataset.name}: coop_compat draws from 'train' and 'val'; the protocol keeps 'test' whole."
        )
    if train is None:
        raise DataError(f"{dataset.name}: coop_compat needs the train split too, whose draws come first.")
    return coop_indices(train.labels, dataset.labels, shots, seed)[1]


def _take_readable(
    dataset: ImageDataset, queues: list[list[int]], wanted: int
) -> tuple[list[list[int]], list[BadImage]]:
    """Take the first ``wanted`` readable images of each queue; also return the unreadable ones met."""
    chosen: list[list[int]] = [[] for _ in queues]
    bad: list[BadImage] = []
    ahead = [0] * len(queues)
    while batch := _next_batch(queues, chosen, ahead, wanted):
        report = verify(dataset, [i for _, i in batch])
        broken = {b.index for b in report.bad}
        bad.extend(report.bad)
        for queue, index in batch:
            if index not in broken:
                chosen[queue].append(index)

    return chosen, bad


def _next_batch(
    queues: list[list[int]], chosen: list[list[int]], ahead: list[int], wanted: int
) -> list[tuple[int, int]]:
    batch: list[tuple[int, int]] = []
    for q, queue in enumerate(queues):
        taken = queue[ahead[q] : ahead[q] + wanted - len(chosen[q])]
        ahead[q] += len(taken)
        batch.extend((q, index) for index in taken)
    return batch
