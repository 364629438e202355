"""CLIP and SigLIP built from a configuration of transformers, as models of open_clip."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from open_clip.model import CLIP, CustomTextCLIP
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from vlprompt.core.errors import BackboneError

__all__ = ["build_transformers_model", "set_gelu"]

_TANH = ("gelu_pytorch_tanh", "gelu_new")
_ACTIVATIONS = ("quick_gelu", "gelu", *_TANH)

# What transformers leaves out of a configuration because it is the default of the kind.
_CLIP_TEXT = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}
_CLIP_VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_SIGLIP_BOTH = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
_SIGLIP_TEXT = {**_SIGLIP_BOTH, "max_position_embeddings": 64, "vocab_size": 32000}
_SIGLIP_VISION = {**_SIGLIP_BOTH, "image_size": 224, "patch_size": 16, "vision_use_head": True}


class SiglipTower(nn.Module):
    """SigLIP's image tower of any size, with the attributes of ``open_clip``'s TimmModel.

    Args:
        vision: transformers' ``vision_config``, complete.
    """

    def __init__(self, vision: Mapping[str, Any]) -> None:
        super().__init__()
        self.image_size = (int(vision["image_size"]), int(vision["image_size"]))
        self.trunk = VisionTransformer(
            img_size=self.image_size,
            patch_size=vision["patch_size"],
            embed_dim=vision["hidden_size"],
            depth=vision["num_hidden_layers"],
            num_heads=vision["num_attention_heads"],
            mlp_ratio=_ratio(vision),
            class_token=False,
            global_pool="map",
            num_classes=0,
            norm_layer=partial(nn.LayerNorm, eps=vision["layer_norm_eps"]),
        )
        self.head = nn.Sequential()

    def forward(self, images: Tensor) -> Tensor:
        """Return (B, d) features of (B, 3, H, W) images."""
        return self.head(self.trunk(images))


def build_transformers_model(config: Mapping[str, Any], source: str) -> nn.Module:
    """Return a model of open_clip, with random weights, that computes what a model of transformers does.

    Args:
        config: A configuration of the kinds ``clip`` or ``siglip``, with ``text_config`` and ``vision_config``.
        source: Where it comes from, for messages.

    Raises:
        BackboneError: If it is of another kind, or has a part that open_clip has not.
    """
    kind = config.get("model_type")
    if kind not in ("clip", "siglip"):
        raise BackboneError(f"{source} describes a {kind!r}; CLIP and SigLIP can be used.")

    defaults = (_CLIP_TEXT, _CLIP_VISION) if kind == "clip" else (_SIGLIP_TEXT, _SIGLIP_VISION)
    text = {**defaults[0], **(config.get("text_config") or {})}
    vision = {**defaults[1], **(config.get("vision_config") or {})}

    activation = text["hidden_act"]
    if activation not in _ACTIVATIONS or vision["hidden_act"] != activation:
        raise BackboneError(
            f"{source}: the activations {activation!r} (text) and {vision['hidden_act']!r} (images) can't be used; "
            f"both towers need the same one of {', '.join(_ACTIVATIONS)}."
        )

    try:
        model = _clip(config, text, vision) if kind == "clip" else _siglip(config, text, vision, source)
    except (TypeError, ValueError, KeyError, AssertionError, ZeroDivisionError) as error:
        raise BackboneError(f"{source} describes no model that can be built: {error!r}.") from error

    set_gelu(model, activation in _TANH)
    return model


def set_gelu(model: nn.Module, tanh: bool) -> None:
    """Let every GELU of a model use the tanh approximation, or not."""
    for module in model.modules():
        if isinstance(module, nn.GELU):
            module.approximate = "tanh" if tanh else "none"


def _clip(config: Mapping[str, Any], text: Mapping[str, Any], vision: Mapping[str, Any]) -> nn.Module:
    end = text["eos_token_id"]
    # 2 stood in old configurations by mistake; there the end is the largest id.
    pooling = {} if end in (2, text["vocab_size"] - 1) else {"pool_type": "eos", "eos_id": end}
    return CLIP(
        config.get("projection_dim", 512),
        {
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "layers": vision["num_hidden_layers"],
            "width": vision["hidden_size"],
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
            "mlp_ratio": _ratio(vision),
            "norm_kwargs": {"eps": vision["layer_norm_eps"]},
        },
        {**_text_tower(text), **pooling},
        quick_gelu=text["hidden_act"] == "quick_gelu",
    )


def _siglip(
    config: Mapping[str, Any], text: Mapping[str, Any], vision: Mapping[str, Any], source: str
) -> nn.Module:
    if not vision["vision_use_head"]:
        raise BackboneError(f"{source}: its image tower has no pooling (vision_use_head is false).")

    placeholder = {"image_size": 16, "patch_size": 16, "layers": 1, "width": 16, "head_width": 16}
    dim = text.get("projection_size") or text["hidden_size"]
    tower = {**_text_tower(text), "no_causal_mask": True, "pool_type": "last", "proj_bias": True}

    model = CustomTextCLIP(dim, placeholder, tower, init_logit_scale=0.0, init_logit_bias=0.0)
    model.visual = SiglipTower(vision)
    return model


def _text_tower(text: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "context_length": text["max_position_embeddings"],
        "vocab_size": text["vocab_size"],
        "width": text["hidden_size"],
        "heads": text["num_attention_heads"],
        "layers": text["num_hidden_layers"],
        "mlp_ratio": _ratio(text),
        "norm_kwargs": {"eps": text["layer_norm_eps"]},
    }


def _ratio(part: Mapping[str, Any]) -> float:
    """Return the width of the hidden layer over the width; half a unit more, because it is rounded down later."""
    return (part["intermediate_size"] + 0.5) / part["hidden_size"]
