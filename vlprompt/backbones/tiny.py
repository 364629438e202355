"""`tiny`: a CLIP of a few million parameters, pretrained on drawn scenes, with its weights in the package."""

from __future__ import annotations

import open_clip
import torch

from vlprompt.backbones import BACKBONES
from vlprompt.backbones.base import Backbone
from vlprompt.backbones.openclip import wrap_open_clip
from vlprompt.backbones.tiny_weights import build_model, load_state, model_config
from vlprompt.backbones.tokenizer import wrap_tokenizer
from vlprompt.core.errors import UnknownNameError

__all__ = ["build_tiny"]


@BACKBONES.register(
    "tiny", summary="64 px ViT + causal text tower pretrained on drawn scenes; embedded, offline"
)
def build_tiny(pretrained: str | None = None, *, seed: int = 0) -> Backbone:
    """Build the embedded backbone.

    Args:
        pretrained: None for the weights in the package, ``"random"`` for seeded random ones.
        seed: Of the random weights.

    Raises:
        UnknownNameError: If ``pretrained`` is something else.
    """
    if pretrained not in (None, "scenes", "random"):
        raise UnknownNameError("weights tag of tiny", pretrained, ["scenes", "random"])

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_model()

    tag = pretrained or "scenes"
    if tag == "scenes":
        load_state(model)

    preprocess = {"size": model_config()["vision_cfg"]["image_size"]}
    tokenizer = wrap_tokenizer(open_clip.SimpleTokenizer())
    return wrap_open_clip(model, preprocess, tokenizer, {"architecture": "tiny", "pretrained": tag})
