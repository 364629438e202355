"""CLIPSeg's two towers: a CLIP ViT whose weights lie in transformers' layout, mapped onto open_clip's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
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

__all__ = ["build_clipseg", "default_config", "layer_state", "read_checkpoint"]

_FILES = ("config.json", "model.safetensors", "pytorch_model.bin")
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, not CLIP's


@BACKBONES.register(
    "clipseg", summary="CLIPSeg's towers (ViT-B/16 at 352 px), from weights in transformers' layout"
)
def build_clipseg(pretrained: str | None = None, *, seed: int = 0) -> Backbone:
    """Build the towers of a CLIPSeg; ``create_segmenter("clipseg", backbone)`` then takes its decoder too.

    Args:
        pretrained: A folder with ``config.json`` and weights, a Hugging Face name (``"CIDAS/clipseg-rd64-refined"``),
            or None for seeded random weights of the published size.
        seed: Of the random weights.

    Raises:
        BackboneError: If the weights can't be had or don't fit.
    """
    config, state = (default_config(), None) if pretrained is None else read_checkpoint(pretrained)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIP(**_architecture(config))

    if state is not None:
        try:
            model.load_state_dict(_towers(state, config), strict=False)
        except (KeyError, RuntimeError) as error:
            raise BackboneError(
                f"{pretrained} does not hold CLIPSeg's towers in transformers' layout: {error}."
            ) from error

    preprocess = {
        "size": config["vision_config"]["image_size"],
        "mean": _MEAN,
        "std": _STD,
        "interpolation": "bicubic",
        "resize_mode": "squash",
    }
    facts = {"architecture": "clipseg", "pretrained": pretrained}
    return wrap_open_clip(model, preprocess, wrap_tokenizer(open_clip.SimpleTokenizer()), facts)


def default_config() -> dict[str, Any]:
    """Return the configuration of CIDAS/clipseg-rd64-refined, as far as it is used here."""
    return {
        "projection_dim": 512,
        "reduce_dim": 64,
        "extract_layers": [3, 6, 9],
        "conditional_layer": 0,
        "decoder_num_attention_heads": 4,
        "decoder_intermediate_size": 2048,
        "use_complex_transposed_convolution": True,
        "text_config": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
                        "num_attention_heads": 8, "max_position_embeddings": 77, "vocab_size": 49408,
                        "hidden_act": "quick_gelu"},
        "vision_config": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
                          "num_attention_heads": 12, "image_size": 352, "patch_size": 16,
                          "hidden_act": "quick_gelu"},
    }  # fmt: skip


def read_checkpoint(source: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return configuration and tensors of a CLIPSeg in transformers' layout. No pickled code is run.

    Args:
        source: A folder, or a Hugging Face name.

    Raises:
        BackboneError: If something is missing, damaged, or can't be fetched; says what to do.
    """
    folder = user_path(source)
    paths = _local(folder) if folder.is_dir() else _fetched(source)
    if paths is None:
        raise BackboneError(f"{source} needs {_FILES[0]}, and {_FILES[1]} or {_FILES[2]}.")

    try:
        stored = json.loads(paths[0].read_text(encoding="utf-8"))
        state = (
            load_file(paths[1])
            if paths[1].suffix == ".safetensors"
            else torch.load(paths[1], map_location="cpu", weights_only=True)
        )
    except Exception as error:  # torch, json and the disk each raise their own kinds
        raise BackboneError(
            f"{source} is not readable as configuration and plain tensors: {error}"
        ) from error

    # transformers leaves out of a configuration what has its own default value: patch 32 and 224 px among them.
    config = default_config()
    config["use_complex_transposed_convolution"] = False
    config["vision_config"] |= {"image_size": 224, "patch_size": 32}

    for key in ("text_config", "vision_config"):
        config[key] = {**config[key], **stored.get(key, {})}
    return {**config, **{k: v for k, v in stored.items() if k not in ("text_config", "vision_config")}}, state


def layer_state(state: Mapping[str, Tensor], prefix: str, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Return one transformer layer's tensors with q, k and v packed into one.

    Args:
        state: Tensors in transformers' layout.
        prefix: Of the layer, with its last dot.
        names: From transformers' names of the layer's parts to ours; ``self_attn`` is translated by itself.
    """
    attention = f"{prefix}self_attn."
    out = {}

    for kind in ("weight", "bias"):
        packed = torch.cat([state[f"{attention}{part}_proj.{kind}"] for part in "qkv"])
        out[f"{names['self_attn']}.in_proj_{kind}"] = packed
        out[f"{names['self_attn']}.out_proj.{kind}"] = state[f"{attention}out_proj.{kind}"]

        for theirs, ours in names.items():
            if theirs != "self_attn":
                out[f"{ours}.{kind}"] = state[f"{prefix}{theirs}.{kind}"]

    return out


_BLOCK = {
    "self_attn": "attn", "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
}  # fmt: skip


def _architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return open_clip's arguments for transformers' configuration."""
    text = config["text_config"]
    vision = config["vision_config"]
    return {
        "embed_dim": config["projection_dim"],
        "quick_gelu": vision["hidden_act"] == "quick_gelu",
        "vision_cfg": {
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "layers": vision["num_hidden_layers"],
            "width": vision["hidden_size"],
            "head_width": vision["hidden_size"] // vision["num_attention_heads"],
            "mlp_ratio": (vision["intermediate_size"] + 0.5) / vision["hidden_size"],  # open_clip rounds down
        },
        "text_cfg": {
            "context_length": text["max_position_embeddings"],
            "vocab_size": text["vocab_size"],
            "width": text["hidden_size"],
            "heads": text["num_attention_heads"],
            "layers": text["num_hidden_layers"],
            "mlp_ratio": (text["intermediate_size"] + 0.5) / text["hidden_size"],
        },
    }


def _towers(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return both towers' tensors by open_clip's names."""
    text = "clip.text_model."
    vision = "clip.vision_model."
    out = {
        "token_embedding.weight": state[f"{text}embeddings.token_embedding.weight"],
        "positional_embedding": state[f"{text}embeddings.position_embedding.weight"],
        "text_projection": state["clip.text_projection.weight"].T.contiguous(),
        "logit_scale": state["clip.logit_scale"],
        "visual.class_embedding": state[f"{vision}embeddings.class_embedding"],
        "visual.positional_embedding": state[f"{vision}embeddings.position_embedding.weight"],
        "visual.conv1.weight": state[f"{vision}embeddings.patch_embedding.weight"],
        "visual.proj": state["clip.visual_projection.weight"].T.contiguous(),
    }
    norms = {f"{text}final_layer_norm": "ln_final", f"{vision}pre_layrnorm": "visual.ln_pre"}
    norms[f"{vision}post_layernorm"] = "visual.ln_post"

    for theirs, ours in norms.items():
        out |= {f"{ours}.{kind}": state[f"{theirs}.{kind}"] for kind in ("weight", "bias")}

    for theirs, ours, part in ((text, "", "text_config"), (vision, "visual.", "vision_config")):
        for i in range(config[part]["num_hidden_layers"]):
            block = layer_state(state, f"{theirs}encoder.layers.{i}.", _BLOCK)
            out |= {f"{ours}transformer.resblocks.{i}.{name}": tensor for name, tensor in block.items()}

    return out


def _local(folder: Path) -> tuple[Path, Path] | None:
    weights = [folder / name for name in _FILES[1:] if (folder / name).is_file()]
    return (folder / _FILES[0], weights[0]) if weights and (folder / _FILES[0]).is_file() else None


def _fetched(name: str) -> tuple[Path, Path] | None:
    from huggingface_hub import hf_hub_download  # only for those who ask for it
    from huggingface_hub.errors import EntryNotFoundError

    try:
        config = Path(hf_hub_download(name, _FILES[0]))
        for file in _FILES[1:]:
            try:
                return config, Path(hf_hub_download(name, file))
            except EntryNotFoundError:
                continue
        return None
    except Exception as error:  # unreachable, unknown, malformed: the hub client raises many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BackboneError(
            f"CLIPSeg's weights {name!r} are no folder here and could not be fetched: {reason} Fetch them where there "
            "is a network and pass the folder. What works offline: the embedded tiny backbone, whose decoder is in "
            "the package."
        ) from error
