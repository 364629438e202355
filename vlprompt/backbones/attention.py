"""Where towers of other libraries project queries, keys and values, and how an adapter joins there.

A place is known by what its module has, not by what it is called: one linear layer for all three (``qkv``), or one each
(``q_proj, k_proj, v_proj``; ``query, key, value``; ``q, k, v``). open_clip's own blocks, which keep one packed matrix
and no layer, run through :mod:`vlprompt.backbones.packed` instead.

Further keys and values join where such an attention calls torch's fused attention: there its own are projected, normed
and turned by their places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vlprompt.backbones.edits import AttentionAdapter, BlockEdit, KeysValues, norms_of
from vlprompt.backbones.packed import is_packable_block

__all__ = [
    "Projections",
    "adapted",
    "find_projections",
    "keys_values_of",
    "looking_at",
    "projections_in",
    "reads_its_layers_weights",
    "shows_its_keys",
]

_SEPARATE = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v"))
# Modules that gather a tower's tokens into one feature: no part of its blocks.
_POOLS = ("attn_pool", "attnpool", "attn_pool_contrastive", "head")


@dataclass(frozen=True)
class Projections:
    """The projections of one attention.

    Attributes:
        attention: The module they belong to.
        layers: The one layer that makes queries, keys and values, or the three; none in open_clip's own blocks.
        width: W of what they read.
        sizes: Widths of queries, keys and values.
    """

    attention: Any
    layers: tuple[nn.Linear, ...]
    width: int
    sizes: tuple[int, int, int]


def find_projections(module: Any) -> Projections | None:
    """Return the projections that a module has of its own, or None."""
    together = getattr(module, "qkv", None)
    if isinstance(together, nn.Linear):
        size = together.out_features // 3
        return Projections(module, (together,), together.in_features, (size, size, size))

    for names in _SEPARATE:
        layers = [getattr(module, name, None) for name in names]
        linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
        if len(linear) == 3 and len({layer.in_features for layer in linear}) == 1:
            query, key, value = linear
            sizes = (query.out_features, key.out_features, value.out_features)
            return Projections(module, (query, key, value), query.in_features, sizes)

    return None


def projections_in(root: nn.Module) -> list[Projections]:
    """Return the projections of every attention below a module, in the order in which modules are registered.

    What pools the tokens is left out: it is no block of the tower.
    """
    if is_packable_block(root):
        width = int(root.attn.embed_dim)  # type: ignore[union-attr, arg-type]  # nn.MultiheadAttention's
        return [Projections(root.attn, (), width, (width, width, width))]

    own = find_projections(root)
    if own is not None:
        return [] if reads_its_layers_weights(root) and not _adds_bias_itself(root) else [own]

    return [p for name, child in root.named_children() if name not in _POOLS for p in projections_in(child)]


def reads_its_layers_weights(module: Any) -> bool:
    """Tell whether an attention reads the weights of its layers by itself, so that the layers are never called.

    torch's own attention does (one packed matrix), so does the pool of CLIP's ResNets, and so do EVA's, BEiT's and
    Swin V2's attention, which lay a bias for queries and values beside their layer for all three.
    """
    pools = hasattr(module, "c_proj") and hasattr(module, "positional_embedding")
    return hasattr(module, "in_proj_weight") or pools or _adds_bias_itself(module)


def _adds_bias_itself(module: Any) -> bool:
    """Tell whether queries, keys and values of one layer get a bias that the layer doesn't have."""
    has_layer = isinstance(getattr(module, "qkv", None), nn.Linear)
    return has_layer and getattr(module, "q_bias", None) is not None and hasattr(module, "qkv_bias_separate")


@contextmanager
def adapted(places: Sequence[Projections], adapters: Sequence[AttentionAdapter | None]) -> Iterator[None]:
    """While open, each adapter's result is added to the queries, keys and values of its place.

    Args:
        places: With layers.
        adapters: One per place, or None where there is none: a function of (..., W) whose result has the widths of
            queries, keys and values, one after the other.
    """
    with ExitStack() as stack:
        for place, adapter in zip(places, adapters, strict=True):
            if adapter is None:
                continue

            add = _adder(place, adapter)
            for number, layer in enumerate(place.layers):
                handle = layer.register_forward_hook(add(number))
                stack.callback(handle.remove)
            if _adds_bias_itself(place.attention):
                stack.enter_context(_calls_its_layer(place.attention))

        yield


def _adder(place: Projections, adapter: AttentionAdapter) -> Callable[[int], Callable[..., Tensor]]:
    """Return, for a layer's number, a hook that adds its part; the adapter runs once per pass."""
    parts: dict[str, Any] = {"input": None, "added": ()}

    def added(x: Tensor) -> Sequence[Tensor]:
        if parts["input"] is not x:
            result = adapter(x)
            parts["input"] = x
            parts["added"] = (result,) if len(place.layers) == 1 else result.split(place.sizes, dim=-1)
        return parts["added"]

    def hook(number: int) -> Callable[..., Tensor]:
        return lambda _, inputs, output: output + added(inputs[0])[number].to(output.dtype)

    return hook


def shows_its_keys(block: Any) -> bool:
    """Tell whether a block of another library has one attention, which calls torch's fused attention."""
    attention = getattr(block, "attn", None)
    return find_projections(attention) is not None and bool(getattr(attention, "fused_attn", False))


def keys_values_of(block: Any, tokens: Tensor) -> KeysValues:
    """Return the keys and values that a block's own weights make of tokens, as deep prompts have them.

    Args:
        block: Of a tower whose attention takes further keys (``require_attention_edits``, ``require_edits``).
        tokens: (M, W), which have no place.
    """
    norms = norms_of(block)
    assert norms is not None  # such blocks begin with one
    attention = block.attn

    if is_packable_block(block):
        width = tokens.shape[-1]
        bias = None if attention.in_proj_bias is None else attention.in_proj_bias[width:]
        normed = norms[0](tokens.to(attention.in_proj_weight.dtype))
        key, value = F.linear(normed, attention.in_proj_weight[width:], bias).chunk(2, -1)
        return KeysValues(key, value)

    place = find_projections(attention)
    assert place is not None
    normed = norms[0](tokens.to(place.layers[0].weight.dtype))
    together = torch.cat([layer(normed) for layer in place.layers], dim=-1)
    _, key, value = together.split(place.sizes, dim=-1)

    if _adds_bias_itself(attention):
        key, value = key + attention.k_bias, value + attention.v_bias
    key = attention.k_norm(key.unflatten(-1, (attention.num_heads, -1))).flatten(-2)
    return KeysValues(key, value)


@contextmanager
def looking_at(blocks: Sequence[Any], edits: Sequence[BlockEdit]) -> Iterator[None]:
    """While open, blocks that another library runs look at their edits' keys and values, too.

    Args:
        blocks: Of an image tower (see :func:`shows_its_keys`).
        edits: One per block.
    """
    attentions = []
    try:
        for block, edit in zip(blocks, edits, strict=True):
            if edit.keys_values is None:
                continue
            block.attn.forward = partial(_look, block.attn.forward, edit.keys_values)
            attentions.append(block.attn)
        yield
    finally:
        for attention in attentions:
            del attention.forward  # the class's own again


def _look(forward: Callable[..., Tensor], further: KeysValues, *arguments: Any, **options: Any) -> Tensor:
    with _KeysInFront(further):
        return forward(*arguments, **options)


class _KeysInFront(TorchFunctionMode):
    """While open, torch's fused attention has further keys and values in front of those that it is called with."""

    def __init__(self, further: KeysValues) -> None:
        super().__init__()
        self.further = further

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See :class:`torch.overrides.TorchFunctionMode`."""
        if func is F.scaled_dot_product_attention:
            query, key, value, *rest = args
            args = (query, *self.further.in_front(key, value), *rest)
        return func(*args, **(kwargs or {}))


@contextmanager
def _calls_its_layer(attention: Any) -> Iterator[None]:
    """While open, an attention that adds a bias by itself calls its layer and adds the bias after it."""
    separate = attention.qkv_bias_separate
    attention.qkv_bias_separate = True
    try:
        yield
    finally:
        attention.qkv_bias_separate = separate
