"""CRIS' two towers: a CLIP that was tuned together with its decoder, from a checkpoint of the published layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import open_clip
import torch
from open_clip.model import CLIP
from safetensors.torch import load_file
from torch import Tensor

from vlprompt.backbones import BACKBONES
from vlprompt.backbones.base import Backbone
from vlprompt.backbones.openclip import wrap_open_clip
from vlprompt.backbones.tokenizer import wrap_tokenizer
from vlprompt.core.errors import BackboneError
from vlprompt.core.paths import user_path

__all__ = ["build_cris", "read_cris"]

_SIZE = 416  # pixels CRIS is trained and asked at


@BACKBONES.register(
    "cris", summary="CRIS' towers (CLIP's RN50 or RN101 at 416 px) from a checkpoint of its layout"
)
def build_cris(pretrained: str | None = None, *, seed: int = 0) -> Backbone:
    """Build the towers of a CRIS; ``create_segmenter("cris", backbone)`` then takes its decoder too.

    Args:
        pretrained: A checkpoint file (safetensors or a torch state dict), or None for random weights of RN50's size.
        seed: Of the random weights.

    Raises:
        BackboneError: If the file can't be read or doesn't hold such towers.
    """
    state = {} if pretrained is None else _part(read_cris(pretrained), "backbone.")
    try:
        arguments = open_clip.get_model_config("RN50") if pretrained is None else _architecture(state)
    except (KeyError, ValueError, IndexError) as error:
        raise BackboneError(f"{pretrained} holds no towers in CRIS' layout: {error} is missing.") from error

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIP(**{**arguments, "quick_gelu": True})

    if state:
        try:
            missing, _ = model.load_state_dict(state, strict=False)
        except RuntimeError as error:
            raise BackboneError(f"{pretrained} does not fit its own sizes: {error}") from error
        if missing := [
            name for name in missing if name != "attn_mask" and not name.endswith("num_batches_tracked")
        ]:
            raise BackboneError(f"{pretrained} holds no towers in CRIS' layout: {missing[0]!r} is missing.")

    preprocess = {"size": _SIZE, "interpolation": "bicubic", "resize_mode": "squash"}
    facts = {"architecture": "cris", "pretrained": pretrained}
    return wrap_open_clip(model, preprocess, wrap_tokenizer(open_clip.SimpleTokenizer()), facts)


def read_cris(path: str) -> dict[str, Tensor]:
    """Return the tensors of a CRIS checkpoint by their published names. No pickled code is run.

    Raises:
        BackboneError: If it can't be read; there are no official weights, so it says where others come from.
    """
    file = user_path(path)
    if not file.is_file():
        raise BackboneError(
            f"no CRIS checkpoint at {path}. Its authors published none; issue 3 of DerrickWang005/CRIS.pytorch links "
            "one that others trained. What works offline: the embedded tiny backbone, whose decoder is in the package."
        )

    try:
        if file.suffix == ".safetensors":
            return _stripped(load_file(file))
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # many kinds; what torch advises (running the code) is no advice
        raise BackboneError(f"{path} is no safetensors file or torch state dict of plain tensors.") from error

    return _stripped(loaded.get("state_dict", loaded) if isinstance(loaded, dict) else {})


def _stripped(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Drop the prefix that training on several devices puts before every name."""
    return {n.removeprefix("module."): t for n, t in state.items() if isinstance(t, Tensor)}


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t.float() for n, t in state.items() if n.startswith(prefix)}


def _architecture(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read open_clip's arguments off the tensors' shapes."""
    width = state["ln_final.weight"].shape[0]
    stages = [{n.split(".")[2] for n in state if n.startswith(f"visual.layer{i}.")} for i in range(1, 5)]
    table = state["visual.attnpool.positional_embedding"]
    blocks = {n.split(".")[2] for n in state if n.startswith("transformer.resblocks.")}
    return {
        "embed_dim": state["text_projection"].shape[1],
        "vision_cfg": {
            "image_size": 32 * round((len(table) - 1) ** 0.5),
            "layers": [len(stage) for stage in stages],
            "width": state["visual.layer1.0.conv1.weight"].shape[0],
        },
        "text_cfg": {
            "context_length": len(state["positional_embedding"]),
            "vocab_size": len(state["token_embedding.weight"]),
            "width": width,
            "heads": max(1, width // 64),
            "layers": len(blocks),
        },
    }
