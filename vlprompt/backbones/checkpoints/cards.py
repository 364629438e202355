"""Cards that lie beside weights: open_clip's ``open_clip_config.json``, and transformers' configuration files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from open_clip.transform import PreprocessCfg, merge_preprocess_dict

from vlprompt.core.errors import BackboneError

__all__ = ["CARD_FILES", "PREPROCESS_FIELDS", "Card", "read_card", "transformers_preprocessing"]

OPEN_CLIP_CARD = "open_clip_config.json"
TRANSFORMERS_CARD = "config.json"
PREPROCESSOR = "preprocessor_config.json"
CARD_FILES = (OPEN_CLIP_CARD, TRANSFORMERS_CARD, PREPROCESSOR)
"""Files that are read, best first."""

PREPROCESS_FIELDS = ("mean", "std", "interpolation", "resize_mode")
_KINDS = ("clip", "siglip")  # of transformers' models that have a counterpart in open_clip
_FILTERS = {2: "bilinear", 3: "bicubic"}  # PIL's numbers


@dataclass(frozen=True)
class Card:
    """What the files beside weights say of them.

    Attributes:
        path: The file that was read.
        model: An open_clip ``model_cfg``; empty if the card is not open_clip's.
        transformers: A transformers configuration of a CLIP or SigLIP; empty if there is none.
        preprocess: Fields of ``PreprocessCfg``; empty if the card does not say.
    """

    path: Path
    model: dict[str, Any] = field(default_factory=dict)
    transformers: dict[str, Any] = field(default_factory=dict)
    preprocess: dict[str, Any] = field(default_factory=dict)


def read_card(folder: Path) -> Card | None:
    """Return the card in a folder; None if there is none that describes a dual encoder.

    Raises:
        BackboneError: If one is damaged.
    """
    path = folder / OPEN_CLIP_CARD
    if path.is_file():
        content = _json(path)
        model = content.get("model_cfg")
        if not isinstance(model, dict):
            raise BackboneError(f"{path} has no 'model_cfg': it is no card of open_clip.")

        # As open_clip fills in what a card leaves out.
        preprocess = merge_preprocess_dict(PreprocessCfg(), content.get("preprocess_cfg") or {})
        return Card(path, model=model, preprocess=_known(preprocess))

    preprocess = {}
    if (folder / PREPROCESSOR).is_file():
        content = _json(folder / PREPROCESSOR)
        if "image_mean" in content or "do_normalize" in content:
            preprocess = transformers_preprocessing(content, str(folder / PREPROCESSOR))

    path = folder / TRANSFORMERS_CARD
    content = _json(path) if path.is_file() else {}
    if content.get("model_type") in _KINDS:
        return Card(path, transformers=content, preprocess=preprocess)
    return Card(folder / PREPROCESSOR, preprocess=preprocess) if preprocess else None


def transformers_preprocessing(content: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return an image processor of transformers as fields of ``PreprocessCfg``.

    Args:
        content: What ``preprocessor_config.json`` holds, or an image processor's ``to_dict()``.
        source: Its name, for messages.

    Raises:
        BackboneError: If it does something that ``PreprocessCfg`` can't say.
    """
    normalise = content.get("do_normalize", True)
    size = content.get("size")
    keeps_proportions = not isinstance(size, Mapping) or "shortest_edge" in size
    resample = int(content.get("resample", 3))

    if resample not in _FILTERS:
        raise BackboneError(
            f"{source}: resample {resample} is neither 2 (bilinear) nor 3 (bicubic). Say what to do instead: "
            "preprocess={'interpolation': 'bicubic'}."
        )

    return {
        "mean": tuple(content["image_mean"]) if normalise and "image_mean" in content else (0.0, 0.0, 0.0),
        "std": tuple(content["image_std"]) if normalise and "image_std" in content else (1.0, 1.0, 1.0),
        "interpolation": _FILTERS[resample],
        "resize_mode": "shortest" if keeps_proportions else "squash",
    }


def _known(preprocess: Mapping[str, Any]) -> dict[str, Any]:
    known = {key: preprocess[key] for key in PREPROCESS_FIELDS}
    if preprocess.get("fill_color"):
        known["fill_color"] = preprocess["fill_color"]
    return {key: tuple(value) if isinstance(value, list) else value for key, value in known.items()}


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BackboneError(f"{path} is not readable JSON: {error}.") from error

    if not isinstance(content, dict):
        raise BackboneError(f"{path} holds a {type(content).__name__}, not keys and values.")
    return content
