"""Pipelines that bring Python code of their own are refused before diffusers sees them.

Before version 0.38, diffusers ran code that lay in a local folder without being asked to: a file named by a
``_class_name`` that is a list, or by a component's library.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from vlprompt.core.errors import BackboneError
from vlprompt.core.paths import user_path

__all__ = ["refuse_custom_code"]

_INDEX = "model_index.json"


def refuse_custom_code(pipeline: str, revision: str | None = None) -> None:
    """Refuse a pipeline whose description names code of its own.

    Args:
        pipeline: A local folder, or a name on the Hugging Face Hub, of which the cache is looked at.
        revision: Branch, tag or commit on the Hub.

    Raises:
        BackboneError: Names the file that would have been run.
    """
    index = _index(pipeline, revision)
    if index is None:
        return

    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        parts = dict(content)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise BackboneError(
            f"the diffusion pipeline {pipeline!r} can't be loaded: {index}: {error}."
        ) from error

    classname = parts.pop("_class_name", "")
    if not isinstance(classname, str):
        raise _refusal(pipeline, f"{_INDEX} names the class {classname!r}, which is code beside it")

    for name, value in parts.items():
        library = value[0] if isinstance(value, list) and value else None
        for file in _code(index.parent, name, library):
            raise _refusal(pipeline, f"{_INDEX} lets the component {name!r} run {file}")


def _index(pipeline: str, revision: str | None) -> Path | None:
    folder = user_path(pipeline)
    if folder.is_dir():
        path = folder / _INDEX
        return path if path.is_file() else None

    try:
        cached = try_to_load_from_cache(pipeline, _INDEX, revision=revision)
    except ValueError:  # a path, and no name on the Hub
        return None
    return Path(cached) if isinstance(cached, str) else None


def _code(folder: Path, component: str, library: Any) -> list[Path]:
    """Return the files of Python that a component's library would mean."""
    if not isinstance(library, str):
        return []
    files = (folder / component / f"{library}.py", folder / f"{library}.py")
    return [file for file in files if file.is_file()]


def _refusal(pipeline: str, reason: str) -> BackboneError:
    return BackboneError(
        f"the diffusion pipeline {pipeline!r} brings code of its own, which is never run: {reason}. "
        "Use a pipeline whose classes are diffusers' own."
    )
