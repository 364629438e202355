"""The catalogue: every data set by name, ready to train or test on."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from vlprompt.data.base import ImageDataset
from vlprompt.data.cards import card_names, check_classnames, check_templates, clean_classname, load_card
from vlprompt.data.fewshot import base_new, few_shot
from vlprompt.data.images import drop_bad
from vlprompt.data.sources import Build, Request, sources
from vlprompt.data.splits import check_split
from vlprompt.errors import DataError, UnknownNameError, nearest

__all__ = ["check_name", "default_root", "list_datasets", "load_dataset"]

_GRAMMAR = "One's own pictures: folder:PATH or csv:PATH."
Names = Sequence[str] | Mapping[str, str]


def default_root() -> Path:
    """Return where downloaded data sets lie: ``VLPROMPT_DATA``, or ``~/.cache/vlprompt/data``."""
    return Path(os.environ.get("VLPROMPT_DATA") or "~/.cache/vlprompt/data").expanduser()


def list_datasets() -> list[str]:
    """Return the sorted names of all data sets; ``folder:PATH``, ``csv:PATH``, ``@style`` come on top."""
    return sorted([*card_names(), *_scene_names()])


def load_dataset(
    name: str,
    split: str = "train",
    shots: int | None = None,
    seed: int = 1,
    classes: Literal["all", "base", "new"] = "all",
    root: str | os.PathLike[str] | None = None,
    sampling: Literal["private", "coop_compat"] = "private",
    on_bad_image: Literal["skip", "error"] = "skip",
    *,
    strict_shots: bool = False,
    max_bad_share: float = 0.05,
    classnames: Names | None = None,
    templates: Sequence[str] | None = None,
    **options: Any,
) -> ImageDataset:
    """Load one split of a data set.

    Args:
        name: A name of :func:`list_datasets`, ``scenes/TASK@STYLE``, ``folder:PATH`` or ``csv:PATH``.
        split: ``"train"``, ``"val"`` or ``"test"``.
        shots: Pictures per class, None for all; ``val`` gives at most 4 per class, as the protocol has it.
        seed: Seed of the draw of shots.
        classes: ``"base"`` is the first half of the classes, ``"new"`` the rest, drawn before they are
            filtered.
        root: Folder of downloaded data sets; :func:`default_root` if None.
        sampling: ``"coop_compat"`` draws the very pictures of the reference code.
        on_bad_image: ``"skip"`` names unreadable pictures in a warning and leaves them out, ``"error"``
            refuses.
        strict_shots: Refuse classes with fewer pictures than ``shots``.
        max_bad_share: Share of unreadable pictures in [0, 1] above which ``"skip"`` refuses too.
        classnames: Other class names, all in order, or a mapping of some old names (or folder names) to new
            ones.
        templates: Other templates, each with one ``{}``.
        options: What the data set's source takes, for example ``download=True`` or ``size=64``.

    Returns:
        The data set; ``info`` records where it came from, how it was split, and which pictures were drawn or
        skipped.

    Raises:
        UnknownNameError: For an unknown name, split, style or choice, with the nearest ones.
        DataError: For anything else that is wrong with the data or the options.
    """
    split = check_split(name, split)
    _check_choices(name, on_bad_image, classes, sampling, max_bad_share)
    place = default_root() if root is None else Path(root).expanduser()
    build, request = _resolve(name, split, place)
    whole = _whole(build, request, options, classnames, templates)
    if shots is None:
        chosen = drop_bad(whole, on_bad_image, max_bad_share)
    else:
        train = None
        if (
            sampling == "coop_compat" and split == "val"
        ):  # the reference draws for train first, from one stream
            train = _whole(build, replace(request, split="train"), options, classnames, templates)
        chosen = few_shot(
            whole, shots, seed, sampling=sampling, train=train, strict_shots=strict_shots,
            on_bad_image=on_bad_image, max_bad_share=max_bad_share,
        )  # fmt: skip
    chosen = base_new(chosen, classes)
    if not len(chosen):
        raise DataError(f"{name}: the split {split!r} has no readable picture of these classes.")
    return chosen


def _check_choices(name: str, on_bad_image: str, classes: str, sampling: str, max_bad_share: float) -> None:
    choices = (
        ("on_bad_image", on_bad_image, ("skip", "error")),
        ("classes", classes, ("all", "base", "new")),
        ("sampling", sampling, ("private", "coop_compat")),
    )
    for key, value, known in choices:
        if value not in known:
            raise UnknownNameError(key, str(value), known)
    if not 0 <= max_bad_share <= 1:
        raise DataError(f"{name}: max_bad_share is a share in [0, 1]; got {max_bad_share!r}.")


def _scene_names() -> list[str]:
    from vlprompt.data import scenes  # only now: the generator's modules are not needed to read a folder

    return [f"scenes/{task}" for task in scenes.list_tasks()]


def _resolve(name: str, split: str, root: Path) -> tuple[Build, Request]:
    """Return what reads a data set, by the grammar of names."""
    if not isinstance(name, str) or not name:
        raise DataError(f"a data set is named by a string, for example 'scenes/shape'; got {name!r}.")
    if name.startswith("scenes/"):
        task = name.removeprefix("scenes/")
        if f"scenes/{task.partition('@')[0]}" not in _scene_names():
            raise UnknownNameError("data set", name, list_datasets(), _GRAMMAR)
        return sources.get("scenes").target, Request(name, task, split, root)
    kind, colon, argument = name.partition(":")
    if colon and kind in sources and sources.get(kind).extra.get("grammar", "").startswith(f"{kind}:"):
        return sources.get(kind).target, Request(name, argument, split, root)
    if name not in card_names():
        raise UnknownNameError("data set", name, list_datasets(), _GRAMMAR)
    card = load_card(name)
    return sources.get(card.source.kind).target, Request(name, "", split, root, card)


def _whole(
    build: Build,
    request: Request,
    options: Mapping[str, Any],
    classnames: Names | None,
    templates: Sequence[str] | None,
) -> ImageDataset:
    """Build a whole split with its final names and templates, and check what every data set must be."""
    _check_options(build, request.name, options)
    dataset = build(request, **options)
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


def _check_options(build: Build, name: str, options: Mapping[str, Any]) -> None:
    """Refuse options that the source doesn't have, all at once, each with the nearest one."""
    parameters = inspect.signature(build).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
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
        raise DataError(f"{name}: {' '.join(problems)} Options of this data set: {allowed}.")


def check_name(name: str) -> None:
    """Refuse a name that no card, generated task or grammar knows, without reading any data.

    Raises:
        UnknownNameError: With the nearest names.
        DataError: If it is not a name at all.
    """
    _resolve(name, "train", default_root())
