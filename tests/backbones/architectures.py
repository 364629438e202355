"""Small architectures that are given to open_clip for the time of a test."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip

SMALL_CONFIG: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@contextmanager
def architecture(folder: Path, name: str, config: dict[str, Any]) -> Iterator[str]:
    """Let open_clip know an architecture."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)
    try:
        yield name
    finally:
        open_clip.factory._MODEL_CONFIG_PATHS.remove(path)
        del open_clip.factory._MODEL_CONFIGS[name]


@contextmanager
def tags(name: str, **entries: dict[str, Any]) -> Iterator[None]:
    """Let open_clip know published weights of an architecture."""
    open_clip.pretrained._PRETRAINED[name] = {
        tag: open_clip.pretrained._pcfg(**e) for tag, e in entries.items()
    }
    try:
        yield
    finally:
        del open_clip.pretrained._PRETRAINED[name]
