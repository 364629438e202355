"""Binary masks over an image tower's weights: which weights, how a mask acts and learns, and how it is stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Kind", "maskable", "masked_weight", "pack", "unpack"]

Kind = Literal["attention.in", "attention.out", "mlp.in", "mlp.out", "conv", "patch"]

_POOLS = {"attn", "attnpool", "attn_pool"}
_OUTPUTS = {"out_proj", "proj", "c_proj", "fc2"}


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
        if isinstance(getattr(module, "in_proj_weight", None), nn.Parameter):
            kinds[f"{path}.in_proj_weight"] = "attention.in"
        kind = _kind(path.split("."), module)
        if kind is not None:
            kinds[f"{path}.weight"] = kind

    return kinds


def _kind(words: Sequence[str], module: nn.Module) -> Kind | None:
    if not isinstance(module, nn.Linear | nn.Conv2d) or words[0] == "head":
        return None
    if "mlp" in words:
        return "mlp.out" if words[-1] in _OUTPUTS else "mlp.in"
    if _POOLS & {*words[:-1]}:
        return "attention.out" if words[-1] in _OUTPUTS else "attention.in"
    if isinstance(module, nn.Linear):
        return None

    stem = words[0] in ("conv1", "conv2", "conv3") or "patch_embed" in words
    return "patch" if stem else "conv"


class _Masked(torch.autograd.Function):
    """weight * [score > threshold]; the score gets the gradient of the mask (straight-through)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, score: Tensor, threshold: float) -> Tensor:
        ctx.save_for_backward(weight)
        return weight * (score > threshold)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        (weight,) = ctx.saved_tensors
        return None, gradients[0] * weight, None


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
