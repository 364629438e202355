"""Opening segmentation data sets by name: pairs of an image and a phrase, each with a mask."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from vlprompt.core.errors import DataError, UnknownNameError
from vlprompt.core.options import check_switches
from vlprompt.core.paths import user_path
from vlprompt.core.seeding import numpy_rng
from vlprompt.data.names import default_root, parse_name
from vlprompt.data.segmentation.base import MaskDataset, MaskSample
from vlprompt.data.segmentation.guards import denies, without_shared
from vlprompt.data.segmentation.pixels import raw_values
from vlprompt.data.segmentation.reading import MaskFiles
from vlprompt.data.segmentation.sources._common import class_phrase
from vlprompt.data.splits import SPLITS, check_split
from vlprompt.data.ways import Ways, mask_ways

__all__ = ["load_segmentation", "open_pairs"]

Queries = Literal["present", "all"]
Leaks = Literal["mend", "keep"]
Empty = Literal["keep", "drop", "error"]


def load_segmentation(
    name: str,
    split: str = "train",
    images: int | None = None,
    seed: int = 1,
    root: str | os.PathLike[str] | None = None,
    *,
    queries: Queries = "present",
    phrase: str | Mapping[str, str] | None = None,
    full_stop: bool = False,
    leaks: Leaks = "mend",
    empty: Empty = "keep",
    dedupe: bool = True,
    download: bool = False,
    **options: Any,
) -> MaskDataset:
    """Load one split of a segmentation data set.

    Args:
        name: A name of ``list_datasets("segmentation")``, ``scenes/masks@STYLE``, ``pairs:PATH``, ``prompts:PATH`` or
            ``per_class:PATH``.
        split: ``"train"``, ``"val"`` or ``"test"``.
        images: Number of images to draw, with all their pairs; None for all.
        seed: Seed of that draw.
        root: Folder of downloaded data sets; ``default_root()`` if None.
        queries: ``"present"`` asks an image for the classes that it shows, as TuneVLSeg does; ``"all"`` asks for every
            class, so that a model also loses by finding what isn't there.
        phrase: Replaces every phrase, or, as a mapping, the phrase of each class that it names.
        full_stop: Put a full stop behind phrases without one, as TuneVLSeg does.
        leaks: ``"mend"`` asks for the class where a phrase says that there is none ("no polyp"), since such a phrase is
            the answer; ``"keep"`` leaves it. Either way ``info`` counts them.
        empty: What happens to pairs whose mask is empty; ``"drop"`` and ``"error"`` read every mask.
        dedupe: Leave images out of train that are in other splits too, by name.
        download: Fetch a data set that isn't there, if its card says from where.
        options: Options of the data set's source, for example ``prompt=1``, ``threshold=127`` or ``size=64``.

    Raises:
        UnknownNameError: For an unknown name, split or choice, with the nearest ones.
        DataError: For anything else that is wrong with the data or the options.
    """
    split = check_split(name, split)
    _check_choices(queries, leaks, empty)
    check_switches(full_stop=full_stop, dedupe=dedupe, download=download)
    ways = _find(name, split, root)
    ways.check_options(options, load_segmentation)
    templates = ("{}",) if ways.card is None else ways.card.templates

    data = ways.build(options, download)
    if dedupe and split == "train" and not name.startswith("scenes/"):  # drawn splits share no image
        data = _without_other_splits(data, ways, options)
    data = _with_phrases(data, templates, phrase, leaks, full_stop)
    if images is not None:
        data = _draw(data, images, seed)
    data = _with_queries(data, queries, templates, full_stop)
    return _without_empty(data, empty)


def open_pairs(name: str, split: str, root: str | os.PathLike[str] | None = None) -> MaskDataset:
    """Return a whole split as it lies on disk: nothing is fetched, changed or decoded.

    Raises:
        AbsentError: If it isn't there.
        DataError: If it is incomplete.
    """
    return _find(name, check_split(name, split), root).build({}, download=False)


def _check_choices(queries: str, leaks: str, empty: str) -> None:
    choices = (
        ("queries", queries, ("present", "all")),
        ("leaks policy", leaks, ("mend", "keep")),
        ("empty policy", empty, ("keep", "drop", "error")),
    )
    for key, value, allowed in choices:
        if value not in allowed:
            raise UnknownNameError(key, str(value), allowed)


def _find(name: str, split: str, root: str | os.PathLike[str] | None) -> Ways[MaskDataset]:
    folder = default_root() if root is None else user_path(root)
    return mask_ways(parse_name(name, "segmentation"), split, folder)


def _without_other_splits(
    data: MaskDataset, ways: Ways[MaskDataset], options: Mapping[str, Any]
) -> MaskDataset:
    """Leave images out of train that are in val or test too."""
    others: list[MaskSample] = []
    for split in SPLITS:
        if split == "train":
            continue
        try:
            others += ways.of_split(split).build(options, download=False).samples
        except DataError:  # the user's own data may have no other split
            continue

    remaining = without_shared(data.samples, others)
    dropped = sorted({str(s.source) for s in data.samples} - {str(s.source) for s in remaining})
    if not dropped:
        return data
    if not remaining:
        raise DataError(
            f"{data.name}: every training image is in another split too. Give each split images of its own."
        )
    warnings.warn(
        f"{data.name}: {len(dropped)} training images are in val or test too and left out: "
        f"{', '.join(dropped[:5])}.",
        stacklevel=3,
    )
    return data.with_samples(remaining, shared_images_dropped=dropped)


def _with_phrases(
    data: MaskDataset,
    templates: tuple[str, ...],
    phrase: str | Mapping[str, str] | None,
    leaks: Leaks,
    full_stop: bool,
) -> MaskDataset:
    """Give every pair its final phrase; refuse pairs without one."""
    replacements = _replacements(data, phrase)
    leaking = [sample for sample in data.samples if denies(sample.phrase)]
    # For each class, the first phrase of the data set that doesn't give the answer away.
    harmless = {s.label: s.phrase for s in reversed(data.samples) if s.phrase and not denies(s.phrase)}

    samples = []
    for sample in data.samples:
        text = replacements.get(sample.label, sample.phrase)
        if denies(text) and leaks == "mend" and sample.label not in replacements:
            text = _mended(data, sample, templates, harmless)
        samples.append(replace(sample, phrase=_stopped(text.strip(), full_stop)))

    without = [sample for sample in samples if not sample.phrase]
    if without:
        raise DataError(
            f"{data.name}: {len(without)} of {len(samples)} pairs have no phrase, for example {without[0].record}. "
            "Pass phrase='...', or write it into phrase.txt or the records (p0 has none by definition)."
        )
    if leaking and leaks == "keep":
        warnings.warn(
            f"{data.name}: {len(leaking)} phrases say that there is nothing to find, for example "
            f"{leaking[0].phrase!r}: they give the answer away.",
            stacklevel=3,
        )
    info = {"phrases_that_deny": len(leaking), "leaks": leaks} if leaking else {}
    return data.with_samples(samples, **info)


def _replacements(data: MaskDataset, phrase: str | Mapping[str, str] | None) -> dict[int, str]:
    """Return the user's phrase of each class, by label. Raises UnknownNameError for an unknown class."""
    if phrase is None:
        return {}
    if isinstance(phrase, str):
        return dict.fromkeys(range(len(data.classnames)), phrase)
    for key in phrase:
        if key not in data.classnames:
            raise UnknownNameError(f"class of {data.name}", str(key), data.classnames)
    return {data.classnames.index(key): text for key, text in phrase.items()}


def _mended(
    data: MaskDataset, sample: MaskSample, templates: tuple[str, ...], harmless: Mapping[int, str]
) -> str:
    """Return a phrase that asks for the class of a pair whose own phrase denies it."""
    if templates == ("{}",) and sample.label in harmless:
        return harmless[sample.label]
    return class_phrase(templates, data.classnames[sample.label], sample.record)


def _stopped(text: str, full_stop: bool) -> str:
    return f"{text}." if full_stop and text and text[-1] not in ".!?" else text


def _draw(data: MaskDataset, images: int, seed: int) -> MaskDataset:
    """Return some images with all their pairs, in the data set's order."""
    if images < 1:
        raise DataError(f"{data.name}: images must be at least 1, got {images}.")
    pairs_of = list(data.images().values())
    # The same images in every style of a drawn data set. The label is part of the seed: it never changes.
    rng = numpy_rng(seed, "few pictures", data.name.partition("@")[0], data.split, images)
    order = rng.permutation(len(pairs_of))

    chosen = sorted(int(image) for image in order[:images])
    pairs = [pair for image in chosen for pair in pairs_of[image]]
    return data.subset(pairs, images=len(chosen), seed=seed)


def _with_queries(
    data: MaskDataset, queries: Queries, templates: tuple[str, ...], full_stop: bool
) -> MaskDataset:
    """Ask images for the classes that they show, or for all."""
    if len(data.classnames) == 1 or data.info.get("source") == "scenes":
        return data
    if queries == "present":
        return _only_present(data)

    samples: list[MaskSample] = []
    for source, indices in data.images().items():
        present = {data.samples[i].label: data.samples[i] for i in indices}
        for label, name in enumerate(data.classnames):
            if label in present:
                samples.append(present[label])
                continue
            record = f"{source}|{name}"
            text = _stopped(class_phrase(templates, name, record), full_stop)
            samples.append(MaskSample(source, (), text, label, record))
    return data.with_samples(samples, queries="all")


def _only_present(data: MaskDataset) -> MaskDataset:
    """Drop pairs of index masks whose class isn't in the image; every such mask is read once."""
    reader = data.reader
    if not isinstance(reader, MaskFiles) or not any(sample.values for sample in data.samples):
        return data
    present: list[int] = []
    for indices in data.images().values():
        path = reader.masks / data.samples[indices[0]].masks[0]
        values = {int(value) for value in np.unique(raw_values(path))}
        present += [i for i in indices if values & set(data.samples[i].values)]
    return data.subset(present, queries="present")


def _without_empty(data: MaskDataset, empty: Empty) -> MaskDataset:
    """Keep, drop or refuse pairs with an empty mask; refuse a data set without pairs."""
    if empty != "keep":
        full = [i for i in range(len(data)) if (data[i].mask == 1).any()]
        missing = sorted(set(range(len(data))) - set(full))
        if missing and empty == "error":
            raise DataError(
                f"{data.name}: {len(missing)} of {len(data)} masks are empty, for example "
                f"{data.samples[missing[0]].record}. An empty mask says that "
                "the phrase fits nothing; pass empty='keep' if that is meant, or empty='drop'."
            )
        if missing:
            data = data.subset(full, empty_dropped=len(missing))
    if not len(data):
        raise DataError(f"{data.name}: the split {data.split!r} has no pair left.")
    return data
