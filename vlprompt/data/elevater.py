"""The ELEVATER benchmark's few-shot draw: k images per class of the train list, a fifth of them held out.

Paper: Li et al., ELEVATER, 2204.08790, section 4. Reference: ``DatasetManifest.sample_few_shot_subset`` of
microsoft/vision-datasets 0.2.x for the draw, ``get_dataloader`` of sIncerass/MVLPT
trainers/vision_benchmark/evaluation/feature.py for the hold-out; both are followed image by image, given the list
in the benchmark's own order. The official val part is not used. At one shot there is nothing to hold out: the same
image trains and validates. Differs: images without a label are not drawn.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Sequence
from dataclasses import replace

from vlprompt.core.errors import DataError
from vlprompt.data.base import ImageDataset
from vlprompt.data.images import BadImagePolicy, SkipLimits, VerificationReport, refuse_if_fatal, verify

__all__ = ["VAL_SHARE", "elevater_draw", "elevater_indices"]

VAL_SHARE = 0.2
Labels = Sequence[tuple[int, ...]]


def elevater_draw(
    train: ImageDataset,
    part: str,
    shots: int,
    seed: int = 1,
    *,
    on_bad_image: BadImagePolicy = "error",
    max_bad_share: float = 0.05,
    max_bad_images: int = 0,
) -> ImageDataset:
    """Draw the train or val part of a few-shot run from the whole train list.

    Unreadable images are passed over, so that the classes keep their shots.

    Args:
        train: The official train list.
        part: ``"train"`` or ``"val"``.
        shots: Images per class, train and val together.
        seed: Seed of the one shuffle.
        on_bad_image: See :func:`vlprompt.data.images.drop_bad`.
        max_bad_share: Share of the whole list, in [0, 1].
        max_bad_images: See :func:`vlprompt.data.images.drop_bad`.

    Returns:
        The part; ``info["indices"]`` holds the positions in the whole list.

    Raises:
        DataError: For impossible ``shots``, or unreadable images, as configured.
    """
    if isinstance(shots, bool) or not isinstance(shots, int) or shots < 1:
        raise DataError(f"{train.name}: shots must be a whole number of at least 1, or None; got {shots!r}.")

    labels = [s.classes for s in train.samples]
    broken: dict[int, str] = {}
    while True:
        chosen = elevater_indices(labels, len(train.classnames), shots, seed, skip=broken)
        bad = verify(train, sorted({i for indices in chosen for i in indices})).bad
        broken |= {b.index: b.name for b in bad}
        if not bad:
            break
        refuse_if_fatal(
            train.name,
            train.split,
            VerificationReport(len(train), bad),
            on_bad_image,
            SkipLimits(max_bad_share, max_bad_images),
            len(train),
        )

    indices = chosen[part == "val"]
    info = {"shots": shots, "seed": seed, "sampling": "elevater", "indices": indices}
    subset = train.subset(indices, **info, **({"skipped": list(broken.values())} if broken else {}))

    return replace(subset, split=part)


def elevater_indices(
    labels: Labels, classes: int, shots: int, seed: int, skip: Collection[int] = ()
) -> tuple[list[int], list[int]]:
    """Return the positions of the train and of the val images.

    Args:
        labels: The labels of every image of the train list, (n,) tuples.
        classes: Number of classes C.
        shots: Images per class, k; a multi-label draw meets it only roughly, as the benchmark does.
        seed: Seed of the one shuffle.
        skip: Positions that may not be drawn.
    """
    # One shuffle of the whole list, as in the reference: the draw depends on the order of the list.
    order = list(range(len(labels)))
    random.Random(seed).shuffle(order)
    counts = [0] * classes

    chosen = []
    for index in order:
        class_counts = [counts[c] for c in labels[index]]
        if index in skip or not class_counts or min(class_counts) >= shots:
            continue
        # An image of several classes is taken if one of them is rare so far, or none is far above its shots.
        if min(class_counts) <= shots / 2 or max(class_counts) <= 1.5 * shots:
            chosen.append(index)
            for c in labels[index]:
                counts[c] += 1
        if min(counts) >= shots:
            break

    if shots == 1:
        return chosen, chosen

    single = all(len(image_labels) <= 1 for image_labels in labels)
    val = set(_hold_out(chosen, labels) if single else _hold_out_multi(chosen, labels, classes))
    return [i for i in chosen if i not in val], [i for i in chosen if i in val]


def _hold_out(chosen: list[int], labels: Labels) -> list[int]:
    """Return the first fifth of each class, rounded up."""
    groups: dict[int, list[int]] = {}
    for index in chosen:
        groups.setdefault(labels[index][0], []).append(index)

    val: list[int] = []
    for group in groups.values():
        val += group[: math.ceil(len(group) * VAL_SHARE)]
    return val


def _hold_out_multi(chosen: list[int], labels: Labels, classes: int) -> list[int]:
    """Return images, taken for the first class that still lacks some, until each has its fifth, rounded up."""
    missing = []
    for c in range(classes):
        count = sum(c in labels[i] for i in chosen)
        missing.append(math.ceil(count * VAL_SHARE))
    remaining = list(chosen)

    val = []
    for c in range(classes):
        while missing[c] > 0:
            index = next(i for i in remaining if c in labels[i])
            remaining.remove(index)
            val.append(index)
            for label in labels[index]:
                missing[label] -= 1

    return val
