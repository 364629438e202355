"""Building the backbone of saved prompts again: what the card records is what is built, wherever its files are now.

A card records where weights were read from, from the root of the file system and from the prompt's own folder. They
are looked for in both places and near the prompt, and are the right ones if their tensors have the recorded hash.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from vlprompt.backbones import BACKBONES, Backbone, create_backbone
from vlprompt.backbones.origin import BUILT, LOCAL_DIR, UNSAVED
from vlprompt.core.errors import BackboneError, CheckpointError
from vlprompt.core.hub import HF_HUB
from vlprompt.core.paths import looks_like_path, user_path
from vlprompt.saved.card import PromptCard
from vlprompt.saved.paths import prompt_folder
from vlprompt.saved.weight_masks import fold, read_masks

__all__ = ["build_from", "rebuild", "written_origin"]

_RELATIVE = "relative"
_ABOVE = 4  # folders above a prompt in which its weights are looked for: a cell, a run, their parents


def written_origin(origin: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return a backbone's origin as a card holds it: with its paths also as they are seen from the card.

    Args:
        origin: See :attr:`vlprompt.backbones.Backbone.origin`.
        folder: Where the card is written.
    """
    start = folder.absolute()
    relative = {}
    for key in ("name", "pretrained", "masks", "tokenizer"):
        path = str(origin.get(key, "")).removeprefix(LOCAL_DIR)
        if os.path.isabs(path):
            relative[key] = os.path.relpath(path, start)
    return {**origin, _RELATIVE: relative} if relative else dict(origin)


def build_from(arguments: Mapping[str, Any]) -> Backbone:
    """Return the backbone of a command that was given no prompt.

    Args:
        arguments: Of :func:`vlprompt.create_backbone`, the name being ``tiny`` if there is none, and ``masks``, which
            are folded into its image tower.

    Raises:
        UnknownNameError: For an unknown name or tag.
        BackboneError: If weights can't be fetched or don't fit.
        CheckpointError: If the masks are missing, damaged or of another backbone.
    """
    options = {"name": "tiny", **arguments}
    masks = options.pop("masks", None)
    backbone = create_backbone(options.pop("name"), **options)
    return backbone if masks is None else fold(backbone, read_masks(masks, backbone))


def rebuild(path: str | Path, card: PromptCard, changes: Mapping[str, Any]) -> Backbone:
    """Return the backbone that a card describes.

    Args:
        path: Where the prompts lie.
        card: What they are.
        changes: Arguments of :func:`vlprompt.create_backbone`, and ``masks``, that take the place of recorded ones.

    Raises:
        CheckpointError: If the card does not say what to build, or its files are nowhere.
        BackboneError: If weights can't be fetched or don't fit.
    """
    origin = _origin(path, card, changes)
    relative = origin.pop(_RELATIVE, {})
    masks = origin.pop("masks", None)
    places = _Places(path, relative, changes)

    backbone = _built(path, card, origin, places)
    if masks is None:
        return backbone

    folder = next((place for place in places.of("masks", str(masks)) if place.is_dir()), None)
    if folder is None:
        raise CheckpointError(places.missing("masks", str(masks)))
    return fold(backbone, read_masks(folder, backbone))


def _origin(path: str | Path, card: PromptCard, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return what to build: what the card records, and what is asked for in its place."""
    saved = card.backbone
    origin = dict(card.origin)

    if not origin:  # older cards, and models that were built by hand
        name, tag = saved.get("architecture"), saved.get("pretrained")
        origin = {"name": name} if tag is None else {"name": name, "pretrained": tag}
    origin = {**origin, **changes}

    unsaved = origin.pop(UNSAVED, [])
    _refuse_unsaved(path, unsaved if isinstance(unsaved, list) else [unsaved], changes)

    name, tag = origin.get("name"), origin.get("pretrained")
    if not isinstance(name, str) or not isinstance(tag, str | None):
        raise CheckpointError(
            f"{path} names no backbone that can be built (architecture {name!r}, pretrained {tag!r}). "
            "Pass backbone=... in Python, or --backbone name=... and --backbone pretrained=... on the command line."
        )
    if "weights_of" not in changes:
        origin.pop(
            "weights_of", None
        )  # what it stood for is in the fingerprint, whatever the tag says by now
    return {**_recorded_facts(name, saved, changes), **origin}


def _refuse_unsaved(path: str | Path, unsaved: list[Any], changes: Mapping[str, Any]) -> None:
    """Say what to pass where a card could not record it."""
    if BUILT in unsaved and "name" not in changes:
        raise CheckpointError(
            f"{path} was trained on a model that was built by hand. Pass it: vlprompt.load(path, "
            "backbone=create_backbone(model, ...)). Or name what has its weights: --backbone name=ARCHITECTURE "
            "--backbone pretrained=PATH."
        )
    if "tokenizer" in unsaved and "tokenizer" not in changes:
        raise CheckpointError(
            f"{path} was trained with a tokenizer that no file can name. Pass the backbone: vlprompt.load(path, "
            "backbone=create_backbone(..., tokenizer=...)). Or name a folder that has it: --backbone tokenizer=FOLDER."
        )


def _recorded_facts(name: str, saved: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the fingerprint says of weights, so that nothing has to be known of them a second time."""
    facts: dict[str, Any] = {}
    preprocess = saved.get("preprocess")
    asked = {"preprocess", "resize", "weights_of"} & changes.keys()
    if isinstance(preprocess, Mapping) and not asked and name not in BACKBONES:
        facts["preprocess"] = {key: value for key, value in preprocess.items() if key != "size"}

    activations = str(saved.get("activation", "none")).split("+")
    if name not in BACKBONES and activations != ["none"] and "weights_of" not in changes:
        facts["quick_gelu"] = "quickgelu" in activations
    return facts


class _Places:
    """Where recorded files may be by now.

    Args:
        path: Where the prompts lie.
        relative: Recorded paths as they are seen from there.
        changes: What was asked for by name; it is nowhere else.
    """

    def __init__(self, path: str | Path, relative: Any, changes: Mapping[str, Any]) -> None:
        self._path = path
        self._relative = relative if isinstance(relative, Mapping) else {}
        self._changes = changes

    @cached_property
    def folder(self) -> Path:
        """The prompt's folder, which is looked for where a card names files: on the Hub that is a request."""
        return prompt_folder(self._path).absolute()

    def of(self, key: str, recorded: str) -> list[Path]:
        """Return the places to look at, best first."""
        first = user_path(recorded)
        if key in self._changes:
            return [first]

        places = [first]
        if isinstance(self._relative.get(key), str):
            places.append(Path(os.path.normpath(self.folder / self._relative[key])))
        places += [above / first for above in self._above() if not first.is_absolute()]
        places += [above / first.name for above in self._above()]
        return list(dict.fromkeys(place.absolute() for place in places))

    def were_asked_for(self, key: str) -> bool:
        """Return whether a place was given in the recorded one's stead; what is wrong with it is said by its reader."""
        return key in self._changes

    def missing(self, key: str, recorded: str) -> str:
        """Return why a file was not found, and what to do."""
        looked = "".join(f"\n  {place}" for place in self.of(key, recorded))
        return (
            f"the {'weights' if key == 'pretrained' else key} of the backbone are not where they were. Say where they "
            f"are: --backbone {key}=PATH on the command line, load(path, backbone={{{key!r}: PATH}}) in Python. "
            f"Looked for:{looked}"
        )

    def _above(self) -> Iterator[Path]:
        yield self.folder
        yield from list(self.folder.parents)[:_ABOVE]


def _built(path: str | Path, card: PromptCard, origin: dict[str, Any], places: _Places) -> Backbone:
    """Return the backbone with the weights whose hash is the recorded one, wherever they lie."""
    arguments = _with_places(origin, places)
    name = arguments.pop("name")
    recorded = arguments.pop("pretrained", None)

    if name.startswith(LOCAL_DIR):
        folder = name.removeprefix(LOCAL_DIR)
        return _first_right(
            card, "name", folder, places, lambda p: create_backbone(f"{LOCAL_DIR}{p}", **arguments)
        )
    asked_in_vain = places.were_asked_for("pretrained") and not user_path(recorded or "").exists()
    if recorded is None or asked_in_vain or not _is_path(recorded):
        return create_backbone(name, recorded, **arguments)
    return _first_right(
        card, "pretrained", recorded, places, lambda p: create_backbone(name, str(p), **arguments)
    )


def _with_places(origin: Mapping[str, Any], places: _Places) -> dict[str, Any]:
    """Return arguments whose further paths are those of this machine."""
    arguments = dict(origin)
    cache = arguments.get("cache_dir")
    if cache is not None and not user_path(cache).is_dir():
        del arguments["cache_dir"]  # another machine's; the usual folder is searched

    tokenizer = arguments.get("tokenizer")
    if isinstance(tokenizer, str) and os.path.isabs(tokenizer):
        there = next((place for place in places.of("tokenizer", tokenizer) if place.exists()), None)
        if there is None:
            raise CheckpointError(places.missing("tokenizer", tokenizer))
        arguments["tokenizer"] = str(there)
    return arguments


def _is_path(recorded: str) -> bool:
    """Return whether weights were read from a path; prompts that were pushed record its last name, ``./NAME``."""
    return not recorded.startswith(HF_HUB) and looks_like_path(recorded)


def _first_right(card: PromptCard, key: str, recorded: str, places: _Places, build: Any) -> Backbone:
    """Build from the first place whose weights have the recorded hash.

    If none has it, the first that could be built is returned, and its difference is named by whoever checks it.
    """
    there = [place for place in places.of(key, recorded) if place.exists()]
    if not there:
        raise CheckpointError(places.missing(key, recorded))

    first = None
    problem = None
    for place in there:
        try:
            backbone = build(place)
        except BackboneError as error:
            problem = problem or error
            continue
        if backbone.fingerprint["weights"] == card.backbone.get("weights"):
            return backbone
        first = first or backbone

    if first is not None:
        return first
    assert problem is not None
    raise problem
