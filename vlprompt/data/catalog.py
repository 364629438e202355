"""The catalogue: every data set by name, ready to train or test on."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from vlprompt.core.errors import DataError, UnknownNameError, nearest
from vlprompt.core.names import check_classnames, check_templates, clean_classname
from vlprompt.data.base import ImageDataset
from vlprompt.data.cards import (
    SourceSpec,
    card_names,
    load_card,
)
from vlprompt.data.elevater import elevater_draw
from vlprompt.data.fewshot import base_new, few_shot
from vlprompt.data.images import drop_bad
from vlprompt.data.sources import AbsentError, Build, Request, sources
from vlprompt.data.splits import check_split

__all__ = ["check_name", "default_root", "list_datasets", "load_dataset", "open_split"]

_GRAMMAR = "One's own images: folder:PATH or csv:PATH."
Names = Sequence[str] | Mapping[str, str]
Sampling = Literal["auto", "private", "coop_compat", "elevater"]
_Ways = list[tuple[Build, Request]]  # to read a data set, best first


def default_root() -> Path:
    """Return where downloaded data sets lie: ``VLPROMPT_DATA``, or ``~/.cache/vlprompt/data``."""
    return Path(os.environ.get("VLPROMPT_DATA") or "~/.cache/vlprompt/data").expanduser()


def list_datasets() -> list[str]:
    """Return the sorted names of all data sets; ``folder:PATH``, ``csv:PATH``, ``@style`` come on top.

    Those of segmentation among them are opened by :func:`vlprompt.load_segmentation`.
    """
    from vlprompt.data.segmentation.sources.scenes import TASKS

    return sorted([*card_names(), *_scene_names(), *(f"scenes/{task}" for task in TASKS)])


def load_dataset(
    name: str,
    split: str = "train",
    shots: int | None = None,
    seed: int = 1,
    classes: Literal["all", "base", "new"] = "all",
    root: str | os.PathLike[str] | None = None,
    sampling: Sampling = "auto",
    on_bad_image: Literal["skip", "error"] = "skip",
    *,
    download: bool = False,
    strict_shots: bool = False,
    max_bad_share: float = 0.05,
    classnames: Names | None = None,
    templates: Sequence[str] | None = None,
    **options: Any,
) -> ImageDataset:
    """Load one split of a data set.

    Args:
        name: A name of :func:`list_datasets`, ``scenes/TASK@STYLE``, ``folder:PATH`` or ``csv:PATH``.
        split: ``"train"``, ``"val"`` or ``"test"``. The train part of a multi-label data set has one sample per
            image and label; its other parts keep all labels together.
        shots: Images per class, None for all; ``val`` gives at most 4 per class, as the protocol has it.
        seed: Seed of the draw of shots.
        classes: ``"base"`` is the first half of the classes, ``"new"`` the rest, drawn before they are
            filtered.
        root: Folder of downloaded data sets; :func:`default_root` if None.
        sampling: ``"private"`` draws from a generator of its own; ``"coop_compat"`` draws the very images of the
            reference code; ``"elevater"`` draws from the train list as the ELEVATER benchmark does, and takes val
            from what it drew; ``"auto"`` is elevater for the cards of that benchmark and private for all others.
        on_bad_image: ``"skip"`` names unreadable images in a warning and leaves them out, ``"error"``
            refuses.
        download: Fetch a data set that isn't there, if its card says from where (see ``vlprompt data prepare``).
        strict_shots: Refuse classes with fewer images than ``shots``.
        max_bad_share: Share of unreadable images in [0, 1] above which ``"skip"`` refuses too.
        classnames: Other class names, all in order, or a mapping of some old names (or folder names) to new
            ones.
        templates: Other templates, each with one ``{}``.
        options: What the data set's source takes, for example ``size=64``.

    Returns:
        The data set; ``info`` records where it came from, how it was split, and which images were drawn or
        skipped.

    Raises:
        UnknownNameError: For an unknown name, split, style or choice, with the nearest ones.
        DataError: For anything else that is wrong with the data or the options.
    """
    split = check_split(name, split)
    _check_choices(name, on_bad_image, classes, sampling, max_bad_share)
    place = default_root() if root is None else Path(root).expanduser()
    ways = _resolve(name, split, place)
    if sampling == "auto":
        card = ways[0][1].card
        sampling = "private" if card is None else card.splits.draw
    whole = partial(_whole, download=download, options=options, classnames=classnames, templates=templates)
    policy = _Policy(on_bad_image, max_bad_share, strict_shots)
    if shots is None:
        chosen = drop_bad(whole(ways), on_bad_image, max_bad_share)
    else:
        chosen = _draw(ways, whole, shots, seed, sampling, policy)
    chosen = base_new(chosen.one_label_each() if split == "train" else chosen, classes)
    if not len(chosen):
        raise DataError(f"{name}: the split {split!r} has no readable image of these classes.")
    return chosen


@dataclass(frozen=True)
class _Policy:
    """What happens to unreadable images and to classes with too few."""

    on_bad_image: Literal["skip", "error"]
    max_bad_share: float
    strict_shots: bool


def _draw(
    ways: _Ways,
    whole: Callable[[_Ways], ImageDataset],
    shots: int,
    seed: int,
    sampling: Sampling,
    policy: _Policy,
) -> ImageDataset:
    """Return a few-shot subset."""
    split, on_bad, share = ways[0][1].split, policy.on_bad_image, policy.max_bad_share
    if sampling == "elevater" and split != "test":
        train_list = whole(_with_split(ways, "train"))
        return elevater_draw(train_list, split, shots, seed, on_bad_image=on_bad, max_bad_share=share)
    # The reference draws for train first, from one stream.
    with_train = sampling == "coop_compat" and split == "val"
    train = whole(_with_split(ways, "train")) if with_train else None
    how: Literal["private", "coop_compat"] = "coop_compat" if sampling == "coop_compat" else "private"
    strict = policy.strict_shots
    return few_shot(
        whole(ways),
        shots,
        seed,
        sampling=how,
        train=train,
        strict_shots=strict,
        on_bad_image=on_bad,
        max_bad_share=share,
    )


def _check_choices(name: str, on_bad_image: str, classes: str, sampling: str, max_bad_share: float) -> None:
    choices = (
        ("on_bad_image", on_bad_image, ("skip", "error")),
        ("classes", classes, ("all", "base", "new")),
        ("sampling", sampling, ("auto", "private", "coop_compat", "elevater")),
    )
    for key, value, known in choices:
        if value not in known:
            raise UnknownNameError(key, str(value), known)
    if not 0 <= max_bad_share <= 1:
        raise DataError(f"{name}: max_bad_share is a share in [0, 1]; got {max_bad_share!r}.")


def _scene_names() -> list[str]:
    from vlprompt.data import scenes  # only now: the generator's modules are not needed to read a folder

    return [f"scenes/{task}" for task in scenes.list_tasks()]


def open_split(name: str, split: str, root: str | os.PathLike[str] | None = None) -> ImageDataset:
    """Return a whole split as it lies on disk: nothing is fetched, and no image is decoded.

    Raises:
        AbsentError: If it isn't there.
        DataError: If it is incomplete.
    """
    place = default_root() if root is None else Path(root).expanduser()
    requests = _resolve(name, check_split(name, split), place)
    return _whole(requests, download=False, options={}, classnames=None, templates=None)


def _resolve(name: str, split: str, root: Path) -> _Ways:
    """Return the ways to read a data set, best first, by the grammar of names."""
    if not isinstance(name, str) or not name:
        raise DataError(f"a data set is named by a string, for example 'scenes/shape'; got {name!r}.")
    from vlprompt.data.segmentation.catalog import is_segmentation

    if is_segmentation(name):
        raise DataError(
            f"{name} is a segmentation data set: open it with vlprompt.load_segmentation({name!r})."
        )
    if name.startswith("scenes/"):
        task = name.removeprefix("scenes/")
        if f"scenes/{task.partition('@')[0]}" not in _scene_names():
            raise UnknownNameError("data set", name, list_datasets(), _GRAMMAR)
        return [(sources.get("scenes").target, Request(name, task, split, root))]
    kind, colon, argument = name.partition(":")
    if colon and kind in sources and sources.get(kind).extra.get("grammar", "").startswith(f"{kind}:"):
        return [(sources.get(kind).target, Request(name, argument, split, root))]
    if name not in card_names():
        raise UnknownNameError("data set", name, list_datasets(), _GRAMMAR)
    card = load_card(name)
    ways: _Ways = []
    source: SourceSpec | None = card.source
    while source is not None:
        ways.append((sources.get(source.kind).target, Request(name, "", split, root, card, source)))
        source = source.otherwise
    return ways


def _with_split(ways: _Ways, split: str) -> _Ways:
    return [(build, replace(request, split=split)) for build, request in ways]


def _build(ways: _Ways, options: Mapping[str, Any], download: bool) -> ImageDataset:
    """Build a split in the first way that finds its files; fetch them and try again if that is wanted.

    Raises:
        AbsentError: If no way finds them: where they were looked for, and how to get them.
    """
    missing = []
    for build, request in ways:
        try:
            return build(request, **{k: v for k, v in options.items() if k in _options_of(build)})
        except AbsentError as error:
            missing.append(str(error))
    request = ways[0][1]
    if request.card is None:
        raise AbsentError(" ".join(missing))
    from vlprompt.data.prepare import advice, fetch  # only now: it needs the network, other data sets don't

    if not download:
        raise AbsentError(f"{' '.join(missing)} {advice(request.card, request.root)}")
    fetch(request.card, request.root)
    return _build(ways, options, download=False)


def _whole(
    ways: _Ways,
    *,
    download: bool,
    options: Mapping[str, Any],
    classnames: Names | None,
    templates: Sequence[str] | None,
) -> ImageDataset:
    """Build a whole split with its final names and templates, and check what every data set must be."""
    _check_options(ways, options)
    dataset, request = _build(ways, options, download), ways[0][1]
    origins = dataset.info.get("origins", dataset.classnames)
    names = _renamed(dataset, origins, classnames)
    check_classnames(names, request.name, origins)
    if len(names) < 2:
        raise DataError(f"{request.name}: a classifier needs at least two classes; found one, {names[0]!r}.")
    if templates is not None:
        if isinstance(templates, str) or not templates:
            raise DataError(
                f"{request.name}: templates is a list of sentences with one {{}} each; got {templates!r}."
            )
        check_templates(templates)
        dataset = replace(dataset, templates=tuple(templates))
    if not len(dataset):
        raise DataError(f"{request.name}: the split {request.split!r} is empty.")
    info = {k: v for k, v in dataset.info.items() if k != "origins"}
    if request.card is not None:
        info["metric"] = request.card.metric
    return replace(dataset, classnames=names, info=info)


def _renamed(dataset: ImageDataset, origins: Sequence[str], new: Names | None) -> tuple[str, ...]:
    old = dataset.classnames
    if new is None:
        return old
    if isinstance(new, Mapping):
        known = {**{o: i for i, o in enumerate(origins)}, **{n: i for i, n in enumerate(old)}}
        if strange := [k for k in new if k not in known]:
            raise UnknownNameError(f"class of {dataset.name}", str(strange[0]), known)
        changed = {known[k]: clean_classname(str(v)) for k, v in new.items()}
        return tuple(changed.get(i, n) for i, n in enumerate(old))
    if isinstance(new, str) or len(new) != len(old):
        got = "a string" if isinstance(new, str) else f"{len(new)} names"
        raise DataError(
            f"{dataset.name}: classnames needs {len(old)} names in order, or a mapping; got {got}."
        )
    return tuple(clean_classname(str(n)) for n in new)


def _options_of(build: Build) -> list[str]:
    return [p.name for p in inspect.signature(build).parameters.values() if p.kind is p.KEYWORD_ONLY]


def _check_options(ways: _Ways, options: Mapping[str, Any]) -> None:
    """Refuse options that no way to read the data set has, all at once, each with the nearest one."""
    known = list(dict.fromkeys(option for build, _ in ways for option in _options_of(build)))
    general = [
        p.name for p in inspect.signature(load_dataset).parameters.values() if p.kind is not p.VAR_KEYWORD
    ]
    problems = []
    for option in options:
        if option not in known:
            close = nearest(option, [*known, *general], 1)
            problems.append(f"unknown option {option!r}." + (f" Did you mean {close[0]!r}?" if close else ""))
    if problems:
        allowed = ", ".join(known) or "none"
        raise DataError(f"{ways[0][1].name}: {' '.join(problems)} Options of this data set: {allowed}.")


def check_name(name: str) -> None:
    """Refuse a name that no card, generated task or grammar knows, without reading any data.

    Raises:
        UnknownNameError: With the nearest names.
        DataError: If it is not a name at all.
    """
    _resolve(name, "train", default_root())
