"""Opening segmentation data sets by name: cards of that task, drawn scenes, and folders of one's own."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vlprompt.core.errors import DataError, UnknownNameError, nearest
from vlprompt.core.seeding import numpy_rng
from vlprompt.data.cards import SourceSpec, card_names, load_card
from vlprompt.data.segmentation.base import MaskDataset, MaskSample
from vlprompt.data.segmentation.guards import denies, without_shared
from vlprompt.data.segmentation.reading import MaskFiles, raw_values
from vlprompt.data.segmentation.sources import BuildPairs, pair_sources
from vlprompt.data.segmentation.sources._common import class_phrase
from vlprompt.data.segmentation.sources.scenes import TASKS
from vlprompt.data.sources import AbsentError, Request
from vlprompt.data.splits import SPLITS, check_split

__all__ = [
    "check_segmentation_name",
    "is_segmentation",
    "list_segmentation",
    "load_segmentation",
    "open_pairs",
]

Queries = Literal["present", "all"]
Leaks = Literal["mend", "keep"]
Empty = Literal["keep", "drop", "error"]
_GRAMMAR = (
    "One's own: pairs:PATH (images and masks), prompts:PATH (with a JSON of phrases) or per_class:PATH."
)
_Way = tuple[BuildPairs, Request]


def list_segmentation() -> list[str]:
    """Return the sorted names of all segmentation data sets; ``@style`` and one's own folders come on top."""
    return sorted([*card_names("segmentation"), *(f"scenes/{task}" for task in TASKS)])


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
        name: A name of :func:`list_segmentation`, ``scenes/masks@STYLE``, ``pairs:PATH``, ``prompts:PATH`` or
            ``per_class:PATH``.
        split: ``"train"``, ``"val"`` or ``"test"``.
        images: Number of images to draw, with all their pairs; None for all.
        seed: Seed of that draw.
        root: Folder of downloaded data sets; ``default_root()`` if None.
        queries: ``"present"`` asks an image for the classes that it shows, as TuneVLSeg does; ``"all"`` asks for every
            class, so that a model is also told when it finds what isn't there.
        phrase: Replaces every phrase, or that of each class named.
        full_stop: Put a full stop behind phrases without one, as TuneVLSeg does.
        leaks: ``"mend"`` asks for the class where a phrase says that there is none ("no polyp"), since such a phrase is
            the answer; ``"keep"`` leaves it. Either way ``info`` counts them.
        empty: What happens to pairs whose mask is empty; ``"drop"`` and ``"error"`` read every mask.
        dedupe: Leave images out of train that other splits hold too, by name.
        download: Fetch a data set that isn't there, if its card says from where.
        options: What the data set's source takes, for example ``prompt=1``, ``threshold=127`` or ``size=64``.

    Raises:
        UnknownNameError: For an unknown name, split or choice, with the nearest ones.
        DataError: For anything else that is wrong with the data or the options.
    """
    split = check_split(name, split)
    for key, value, known in (
        ("queries", queries, ("present", "all")),
        ("leaks policy", leaks, ("mend", "keep")),
        ("empty policy", empty, ("keep", "drop", "error")),
    ):
        if value not in known:
            raise UnknownNameError(key, str(value), known)
    ways = _resolve(name, split, _root(root))
    data = _built(ways, options, download)
    if dedupe and split == "train" and not name.startswith("scenes/"):  # drawn splits share nothing
        data = _without_other_splits(data, ways, options)
    data = _phrased(data, _templates(ways), phrase, leaks, full_stop)
    if images is not None:
        data = _draw(data, images, seed)
    data = _asked(data, queries, _templates(ways), full_stop)
    return _with_policy(data, empty)


def open_pairs(name: str, split: str, root: str | os.PathLike[str] | None = None) -> MaskDataset:
    """Return a whole split as it lies on disk: nothing is fetched, changed or decoded.

    Raises:
        AbsentError: If it isn't there.
        DataError: If it is incomplete.
    """
    return _built(_resolve(name, check_split(name, split), _root(root)), {}, download=False)


def is_segmentation(name: str) -> bool:
    """Return whether a name means a segmentation data set, without reading any data."""
    kind, colon, _ = name.partition(":")
    if name.startswith("scenes/"):
        return name.removeprefix("scenes/").partition("@")[0] in TASKS
    if colon and kind in pair_sources:
        return bool(pair_sources.get(kind).extra.get("grammar", "").startswith(f"{kind}:"))
    return name in card_names("segmentation")


def check_segmentation_name(name: str) -> None:
    """Refuse a name that means no segmentation data set. Raises UnknownNameError with the nearest ones."""
    _resolve(name, "train", _root(None))


def _root(root: str | os.PathLike[str] | None) -> Path:
    from vlprompt.data.catalog import default_root

    return default_root() if root is None else Path(root).expanduser()


def _resolve(name: str, split: str, root: Path) -> list[_Way]:
    """Return the ways to read a data set, best first, by the grammar of names."""
    if not isinstance(name, str) or not is_segmentation(name):
        raise UnknownNameError("segmentation data set", str(name), list_segmentation(), _GRAMMAR)
    if name.startswith("scenes/"):
        return [(pair_sources.get("scenes").target, Request(name, name.removeprefix("scenes/"), split, root))]
    kind, colon, argument = name.partition(":")
    if colon:
        return [(pair_sources.get(kind).target, Request(name, argument, split, root))]
    card = load_card(name)
    ways: list[_Way] = []
    source: SourceSpec | None = card.source
    while source is not None:
        ways.append((pair_sources.get(source.kind).target, Request(name, "", split, root, card, source)))
        source = source.otherwise
    return ways


def _built(ways: list[_Way], options: Mapping[str, Any], download: bool) -> MaskDataset:
    """Build a split in the first way that finds its files; fetch them and try again if that is wanted."""
    _check_options(ways, options)
    missing = []
    for build, request in ways:
        try:
            return build(request, **{k: v for k, v in options.items() if k in _options_of(build)})
        except AbsentError as error:
            missing.append(str(error))
    request = ways[0][1]
    if request.card is None:
        raise AbsentError(" ".join(missing))
    from vlprompt.data.prepare import advice, fetch  # only now: it needs the network

    if not download:
        raise AbsentError(f"{' '.join(missing)} {advice(request.card, request.root)}")
    fetch(request.card, request.root)
    return _built(ways, options, download=False)


def _options_of(build: Callable[..., Any]) -> list[str]:
    return [p.name for p in inspect.signature(build).parameters.values() if p.kind is p.KEYWORD_ONLY]


def _check_options(ways: list[_Way], options: Mapping[str, Any]) -> None:
    known = list(dict.fromkeys(option for build, _ in ways for option in _options_of(build)))
    general = [p.name for p in inspect.signature(load_segmentation).parameters.values()]
    problems = []
    for option in (o for o in options if o not in known):
        close = nearest(option, [*known, *general], 1)
        problems.append(f"unknown option {option!r}." + (f" Did you mean {close[0]!r}?" if close else ""))
    if problems:
        allowed = ", ".join(known) or "none"
        raise DataError(f"{ways[0][1].name}: {' '.join(problems)} Options of this data set: {allowed}.")


def _templates(ways: list[_Way]) -> tuple[str, ...]:
    card = ways[0][1].card
    return ("{}",) if card is None else card.templates


def _without_other_splits(data: MaskDataset, ways: list[_Way], options: Mapping[str, Any]) -> MaskDataset:
    """Leave images out of train that val or test hold too."""
    others: list[MaskSample] = []
    for split in (s for s in SPLITS if s != "train"):
        try:
            others += _built([(b, replace(r, split=split)) for b, r in ways], options, download=False).samples
        except DataError:  # a data set of one's own needs no other splits to train on
            continue
    kept = without_shared(data.samples, others)
    dropped = sorted({str(s.source) for s in data.samples} - {str(s.source) for s in kept})
    if not dropped:
        return data
    if not kept:
        raise DataError(
            f"{data.name}: every training image is in another split too. Give each split its own."
        )
    warnings.warn(
        f"{data.name}: {len(dropped)} training images are in val or test too and left out: "
        f"{', '.join(dropped[:5])}.",
        stacklevel=3,
    )
    return data.with_samples(kept, shared_images_dropped=dropped)


def _phrased(
    data: MaskDataset,
    templates: tuple[str, ...],
    phrase: str | Mapping[str, str] | None,
    leaks: Leaks,
    full_stop: bool,
) -> MaskDataset:
    """Give every pair its final phrase; refuse pairs without one."""
    if isinstance(phrase, Mapping):
        if strange := [k for k in phrase if k not in data.classnames]:
            raise UnknownNameError(f"class of {data.name}", str(strange[0]), data.classnames)
        new = {data.classnames.index(k): v for k, v in phrase.items()}
    else:
        new = {} if phrase is None else dict.fromkeys(range(len(data.classnames)), phrase)
    leaking = [s for s in data.samples if denies(s.phrase)]
    asking = {s.label: s.phrase for s in reversed(data.samples) if s.phrase and not denies(s.phrase)}
    samples = []
    for sample in data.samples:
        text = new.get(sample.label, sample.phrase)
        if denies(text) and leaks == "mend" and sample.label not in new:
            text = _class_asked(data, sample, templates, asking)
        samples.append(replace(sample, phrase=_stopped(text.strip(), full_stop)))
    if lacking := [s for s in samples if not s.phrase]:
        raise DataError(
            f"{data.name}: {len(lacking)} of {len(samples)} pairs have no phrase, for example {lacking[0].record}. "
            "Pass phrase='...', or write it into phrase.txt or the records (p0 has none by definition)."
        )
    info = {"phrases_that_deny": len(leaking), "leaks": leaks} if leaking else {}
    if leaking and leaks == "keep":
        warnings.warn(
            f"{data.name}: {len(leaking)} phrases say that there is nothing to find, for example "
            f"{leaking[0].phrase!r}: they give the answer away.",
            stacklevel=3,
        )
    return data.with_samples(samples, **info)


def _class_asked(
    data: MaskDataset, sample: MaskSample, templates: tuple[str, ...], asking: Mapping[int, str]
) -> str:
    """Return a phrase that asks for the class of a pair whose own phrase denies it."""
    if templates == ("{}",) and sample.label in asking:
        return asking[sample.label]
    return class_phrase(templates, data.classnames[sample.label], sample.record)


def _stopped(text: str, full_stop: bool) -> str:
    return f"{text}." if full_stop and text and text[-1] not in ".!?" else text


def _draw(data: MaskDataset, images: int, seed: int) -> MaskDataset:
    """Return some images with all their pairs, in the data set's order."""
    if images < 1:
        raise DataError(f"{data.name}: images must be at least 1, got {images}.")
    pairs_of = list(data.images().values())
    order = numpy_rng(seed, "few pictures", data.name.partition("@")[0], data.split, images).permutation(
        len(pairs_of)
    )
    chosen = sorted(int(i) for i in order[:images])
    return data.subset([i for p in chosen for i in pairs_of[p]], images=len(chosen), seed=seed)


def _asked(data: MaskDataset, queries: Queries, templates: tuple[str, ...], full_stop: bool) -> MaskDataset:
    """Ask images for the classes they show, or for all."""
    if len(data.classnames) == 1 or data.info.get("source") == "scenes":
        return data
    if queries == "present":
        return _only_shown(data)
    samples: list[MaskSample] = []
    for source, indices in data.images().items():
        own = {data.samples[i].label: data.samples[i] for i in indices}
        for label, name in enumerate(data.classnames):
            record = f"{source}|{name}"
            asked = MaskSample(
                source, (), _stopped(class_phrase(templates, name, record), full_stop), label, record
            )
            samples.append(own.get(label, asked))
    return data.with_samples(samples, queries="all")


def _only_shown(data: MaskDataset) -> MaskDataset:
    """Drop pairs of index masks whose class isn't in the image; every such mask is read once."""
    reader = data.reader
    if not isinstance(reader, MaskFiles) or not any(s.values for s in data.samples):
        return data
    kept: list[int] = []
    for indices in data.images().values():
        path = reader.masks / data.samples[indices[0]].masks[0]
        found = {int(v) for v in np.unique(raw_values(path))}
        kept += [i for i in indices if found & set(data.samples[i].values)]
    return data.subset(kept, queries="present")


def _with_policy(data: MaskDataset, empty: Empty) -> MaskDataset:
    """Keep, drop or refuse pairs with an empty mask; refuse a data set without pairs."""
    if empty != "keep":
        full = [i for i in range(len(data)) if (data[i].mask == 1).any()]
        if lost := len(data) - len(full):
            first = next(s.record for i, s in enumerate(data.samples) if i not in set(full))
            if empty == "error":
                raise DataError(
                    f"{data.name}: {lost} of {len(data)} masks are empty, for example {first}. An empty mask says that "
                    "the phrase fits nothing; pass empty='keep' if that is meant, or empty='drop'."
                )
            data = data.subset(full, empty_dropped=lost)
    if not len(data):
        raise DataError(f"{data.name}: the split {data.split!r} has no pair left.")
    return data
