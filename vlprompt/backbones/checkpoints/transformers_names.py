"""CLIP and SigLIP as transformers names their tensors, by open_clip's names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vlprompt.backbones.checkpoints import WeightsError

__all__ = ["from_transformers", "is_transformers"]

_MARK = "vision_model.embeddings.patch_embedding.weight"
_PROBE = "vision_model.head.probe"

_CLIP = {
    "logit_scale": "logit_scale",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm": "visual.ln_pre",
    "vision_model.post_layernorm": "visual.ln_post",
}
_TRANSPOSED = {"text_projection.weight": "text_projection", "visual_projection.weight": "visual.proj"}

_SIGLIP = {
    "logit_scale": "logit_scale",
    "logit_bias": "logit_bias",
    "text_model.embeddings.token_embedding.weight": "text.token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "text.positional_embedding",
    "text_model.final_layer_norm": "text.ln_final",
    "text_model.head": "text.text_projection",
    "vision_model.embeddings.patch_embedding": "visual.trunk.patch_embed.proj",
    "vision_model.embeddings.position_embedding.weight": "visual.trunk.pos_embed",
    "vision_model.post_layernorm": "visual.trunk.norm",
    "vision_model.head.probe": "visual.trunk.attn_pool.latent",
    "vision_model.head.attention.out_proj": "visual.trunk.attn_pool.proj",
    "vision_model.head.layernorm": "visual.trunk.attn_pool.norm",
    "vision_model.head.mlp": "visual.trunk.attn_pool.mlp",
}

# The parts of a block: of open_clip's own transformers, and of timm's.
_BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_TIMM_BLOCK = {
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "mlp": "mlp",
    "self_attn.out_proj": "attn.proj",
}


def is_transformers(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether tensors have transformers' names."""
    return _MARK in tensors


def from_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of a ``CLIPModel`` or ``SiglipModel`` by open_clip's names.

    CLIP's are named like OpenAI's, SigLIP's like those of ``open_clip.CustomTextCLIP`` with a tower of timm. Names
    that are in neither layout stay as they are.

    Raises:
        WeightsError: If queries, keys and values are not complete.
    """
    siglip = _PROBE in tensors
    names = _SIGLIP if siglip else _CLIP
    blocks = {
        "text_model.encoder.layers.": ("text." if siglip else "") + "transformer.resblocks.",
        "vision_model.encoder.layers.": "visual.trunk.blocks." if siglip else "visual.transformer.resblocks.",
    }
    out: dict[str, Tensor] = {}

    for name, tensor in tensors.items():
        if name.endswith("position_ids"):  # 0, 1, 2 ...: older versions wrote them down
            continue
        if not siglip and name in _TRANSPOSED:
            out[_TRANSPOSED[name]] = tensor.T
            continue

        start = next((start for start in blocks if name.startswith(start)), None)
        if start is None:
            out[_renamed(name, names)] = tensor
            continue

        number, _, rest = name.removeprefix(start).partition(".")
        block = f"{blocks[start]}{number}."
        timm = block.startswith("visual.trunk.")

        if rest.startswith("self_attn.q_proj."):
            kind = rest.removeprefix("self_attn.q_proj.")
            target = f"attn.qkv.{kind}" if timm else f"attn.in_proj_{kind}"
            out[block + target] = _packed(tensors, f"{start}{number}.self_attn.", kind)
        elif not rest.startswith(("self_attn.k_proj.", "self_attn.v_proj.")):
            out[block + _renamed(rest, _TIMM_BLOCK if timm else _BLOCK)] = tensor

    return _split_pooling(out) if siglip else out


def _renamed(name: str, names: Mapping[str, str]) -> str:
    """Return a tensor's new name; a table's entry may be the whole name, or all but its last parts."""
    for theirs, ours in names.items():
        if name == theirs or name.startswith(f"{theirs}."):
            return ours + name.removeprefix(theirs)
    return name


def _packed(tensors: Mapping[str, Tensor], attention: str, kind: str) -> Tensor:
    """Return queries', keys' and values' weights or biases in one tensor."""
    parts = [f"{attention}{part}_proj.{kind}" for part in "qkv"]
    missing = [part for part in parts if part not in tensors]
    if missing:
        raise WeightsError(f"it has no {missing[0]}")
    return torch.cat([tensors[part] for part in parts])


def _split_pooling(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return SigLIP's tensors with its pooling in timm's layout, where the query has a weight of its own."""
    for kind in ("weight", "bias"):
        packed = tensors.pop(f"vision_model.head.attention.in_proj_{kind}", None)
        if packed is not None:
            query, keys_and_values = packed.tensor_split([len(packed) // 3])
            tensors[f"visual.trunk.attn_pool.q.{kind}"] = query
            tensors[f"visual.trunk.attn_pool.kv.{kind}"] = keys_and_values

    positions = tensors.get("visual.trunk.pos_embed")
    if positions is not None and positions.dim() == 2:
        tensors["visual.trunk.pos_embed"] = positions[None]
    return tensors
