"""How a backbone was built, so that it can be built again somewhere else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip

from vlprompt.core.paths import looks_like_path, user_path

__all__ = ["BUILT", "LOCAL_DIR", "UNSAVED", "complete", "complete_if_there", "origin_of"]

LOCAL_DIR = "local-dir:"
UNSAVED = "unsaved"
"""Key of an origin that lists options which no file can hold, such as a tokenizer object."""

BUILT = "model"
"""Stands under :data:`UNSAVED` for a model that was built elsewhere."""

_PATHS = ("cache_dir", "masks")  # options that are always paths


def origin_of(name: str, pretrained: str | Path | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of :func:`vlprompt.create_backbone` as plain data, with paths that are complete.

    Args:
        name: As it was given.
        pretrained: As it was given.
        options: As they were given.

    Returns:
        ``name``, ``pretrained`` and the options that say something. Options that are no plain data are listed under
        :data:`UNSAVED`.
    """
    origin: dict[str, Any] = {"name": name}
    if name.startswith(LOCAL_DIR):
        origin["name"] = LOCAL_DIR + complete(name.removeprefix(LOCAL_DIR))
    if pretrained is not None:
        origin["pretrained"] = _complete_weights(name, str(pretrained))

    unsaved = []
    for key, value in options.items():
        if value is None:
            continue
        if key in _PATHS:
            origin[key] = complete(str(value))
        elif key == "tokenizer":
            if isinstance(value, str):
                origin[key] = complete_if_there(value)
            else:
                unsaved.append(key)
        else:
            origin[key] = _plain(value)

    return {**origin, UNSAVED: unsaved} if unsaved else origin


def complete(path: str) -> str:
    """Return a path from the root."""
    return str(user_path(path).absolute())


def complete_if_there(text: str) -> str:
    """Return the whole path if there is something at a path; tags and names stay as they are."""
    return complete(text) if user_path(text).exists() else text


def _complete_weights(name: str, pretrained: str) -> str:
    """Return the whole path of weights; a tag stays as it is, also where a file of its name lies."""
    could_be_tag = not looks_like_path(pretrained)
    if could_be_tag and (
        name not in open_clip.list_models() or pretrained in open_clip.list_pretrained_tags_by_model(name)
    ):
        return pretrained
    return complete_if_there(pretrained)


def _plain(value: Any) -> Any:
    """Return a value as JSON would give it back."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value
