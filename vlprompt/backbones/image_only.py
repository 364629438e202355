"""Backbones without their text tower, for classifiers whose class vectors are known."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vlprompt.backbones import BACKBONES, create_backbone
from vlprompt.backbones.base import Backbone
from vlprompt.backbones.openclip import wrap_open_clip
from vlprompt.backbones.tiny_weights import WEIGHTS, build_model, model_config
from vlprompt.core.errors import BackboneError
from vlprompt.core.files import read_tensors

__all__ = ["image_backbone", "without_text"]

_MISSING = (
    "the text tower was left out (see vlprompt.backbones.image_only): this backbone encodes images alone."
)


class _ImageModel(nn.Module):
    """The image tower and the scale of an open_clip model."""

    text_left_out = _MISSING

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.visual = model.visual
        self.logit_scale = model.logit_scale
        if getattr(model, "logit_bias", None) is not None:
            self.logit_bias = model.logit_bias


def without_text(backbone: Backbone) -> Backbone:
    """Return a backbone that shares the image tower and has no text tower; with the original gone, it is freed.

    Its fingerprint is the image side's own, so prompts of the whole backbone don't fit it.
    """
    if isinstance(backbone.model, _ImageModel):
        return backbone
    facts = {k: backbone.fingerprint.get(k) for k in ("architecture", "pretrained")}
    alone = _wrap(
        _ImageModel(backbone.model), backbone.fingerprint["preprocess"], facts, backbone.image_weights
    )
    alone.image_weights = backbone.image_weights
    alone._known_scale = backbone._known_scale  # more precise than weights that were cast to half precision
    return alone


def image_backbone(name: str, pretrained: str | None = None, **options: Any) -> Backbone:
    """Build the image side of a backbone; arguments as :func:`vlprompt.create_backbone`.

    Of ``tiny`` the text tower is neither built nor read; of others it is dropped after loading, since their weights
    come in one file.

    Raises:
        UnknownNameError: For an unknown name or tag, with the nearest valid ones.
        BackboneError: If weights can't be fetched or don't fit.
    """
    if name != "tiny" or pretrained not in (None, "scenes") or options:
        return without_text(create_backbone(name, pretrained, **options))

    assert name in BACKBONES
    with torch.device("meta"):  # shapes only: nothing is allocated for the text tower
        model: Any = build_model()

    tensors, _ = read_tensors(WEIGHTS, prefixes=("visual.", "logit_scale"))
    part = _ImageModel(model).to_empty(device="cpu")
    try:
        part.load_state_dict({n: t.float() for n, t in tensors.items()}, strict=True)
    except RuntimeError as error:
        raise BackboneError(f"{WEIGHTS} does not fit the tiny CLIP: {error}") from error

    facts = {"architecture": "tiny", "pretrained": "scenes"}
    return _wrap(part, {"size": model_config()["vision_cfg"]["image_size"]}, facts)


def _wrap(
    model: nn.Module, preprocess: dict[str, Any], facts: dict[str, Any], weights: str | None = None
) -> Backbone:
    return wrap_open_clip(model, dict(preprocess), None, {**facts, "towers": "image"}, _MISSING, weights)
