"""Binary masks over an image tower's weights: which weights, how a mask acts and learns, and how it is stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from vlprompt.backbones.attention import find_projections

__all__ = ["Kind", "maskable", "masked_weight", "pack", "unpack"]

Kind = Literal["attention.in", "attention.out", "mlp.in", "mlp.out", "conv", "patch"]

_OUTPUTS = {"out_proj", "proj", "c_proj", "fc2"}
_PATCHES = {"conv1", "conv2", "conv3"}  # a ViT's patch embedding, a ResNet's stem


def maskable(visual: nn.Module) -> dict[str, Kind]:
    """Return the weights of an image tower that a mask may cover, by name, and what each is.

    These are the matrices and filters of its layers: projections of attention (``attention.in``: queries, keys and
    values; ``attention.out``), of MLPs (``mlp.in``, ``mlp.out``), other convolutions (``conv``), and what turns
    pixels into patches (``patch``; a ResNet's stem). Biases, norms, positions, the class token and the projection
    into the joint space are never masked.

    Args:
        visual: The image side of an open_clip model; names are relative to it.
    """
    kinds: dict[str, Kind] = {}
    for path, module in visual.named_modules():
        for name in _packed(module):
            kinds[f"{path}.{name}"] = "attention.in"

        parent = visual.get_submodule(path.rpartition(".")[0])
        kind = _kind(path.split("."), module, parent)
        if kind is not None:
            kinds[f"{path}.weight"] = kind

    return kinds


def _kind(words: Sequence[str], module: nn.Module, parent: nn.Module) -> Kind | None:
    if not isinstance(module, nn.Linear | nn.Conv2d) or words[0] == "head":
        return None
    if "mlp" in words:
        return "mlp.out" if words[-1] in _OUTPUTS else "mlp.in"
    if _attends(parent):
        return "attention.out" if words[-1] in _OUTPUTS else "attention.in"

    embeds = words[0] in _PATCHES or bool({"patch_embed", "embeds", "stem", "conv_stem"} & {*words})
    if embeds:
        return "patch"
    return None if isinstance(module, nn.Linear) else "conv"


def _attends(module: nn.Module) -> bool:
    """Tell whether a module is an attention: it projects queries, keys and values, or queries and the two together."""
    pair = [getattr(module, name, None) for name in ("q", "kv")]
    two = all(isinstance(layer, nn.Linear) for layer in pair)
    return bool(_packed(module)) or two or find_projections(module) is not None


def _packed(module: nn.Module) -> list[str]:
    """Return the names of the projections that an attention keeps as parameters, without a layer."""
    names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
    return [name for name in names if isinstance(getattr(module, name, None), nn.Parameter)]


class _Masked(torch.autograd.Function):
    """weight * [score > threshold]; the score gets the gradient of the mask (straight-through)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, score: Tensor, threshold: float) -> Tensor:
        ctx.save_for_backward(weight)
        return weight * (score > threshold)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        (weight,) = ctx.saved_tensors
        return None, (gradients[0] * weight).float(), None


def masked_weight(weight: Tensor, score: Tensor, threshold: float) -> Tensor:
    """Return the weight where its score is above the threshold, and 0 elsewhere.

    The score's gradient is that of the binary mask, weight * dL/d(masked weight): forward a step, backward the
    identity (Mallya et al., "Piggyback", ECCV 2018, section 3.2).
    """
    return _Masked.apply(weight, score, threshold)


def pack(mask: Tensor) -> Tensor:
    """Return a mask as ceil(n / 8) bytes (uint8): row by row, the first element in a byte's highest bit, zeros last."""
    return torch.from_numpy(np.packbits(mask.detach().cpu().numpy().astype(bool).ravel()))


def unpack(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the boolean mask of ``shape`` that :func:`pack` made ``bits`` of."""
    count = int(np.prod(shape, dtype=np.int64))
    flat = np.unpackbits(bits.cpu().numpy(), count=count).view(bool)
    return torch.from_numpy(flat).reshape(tuple(shape))
