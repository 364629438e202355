"""Text features of many classes from a causal tower without computing anything twice.

Three facts make this exact, not approximate. In a causal tower a token never sees a later one, so (1) the
beginning that all sentences share has the same states in every sentence and is run once; (2) padding after
the end token is never looked at, so each sentence's own tokens are packed without any; (3) in the last block
only the end token's row is read, so only that row's query, output and MLP are computed. Linear layers see one
packed matrix, attention sees tiles of tokens with a mask that keeps sentences apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlprompt.backbones.edits import (
    Adapter,
    AttentionAdapter,
    BlockEdit,
    edit_of,
    enter_tokens,
    entered_tokens,
)
from vlprompt.backbones.layout import DeepPrompts, PromptLayout, Slots, Tiles, insert_rows

__all__ = ["Adapter", "Offsets", "encode_packed", "is_packable_block", "quick_attention", "run_block"]

KeyValue = tuple[Tensor, Tensor]
Offsets = tuple[Slots, Tensor]
"""Where offsets are added to a list of sources, and all of them: (G or 1, K, W)."""
Adapters = Sequence[Adapter | None]
Edits = Sequence[BlockEdit]


class PackableTower(Protocol):
    """What packing asks of a text tower (see :class:`vlprompt.backbones.text.TextTower`).

    Attributes:
        blocks: Its residual blocks.
        layers: L, their number.
        width: W.
        memory: Bytes that the states of one pass may take.
    """

    blocks: Any
    layers: int
    width: int
    memory: int

    def assemble(
        self,
        sources: Tensor,
        slots: Slots,
        positions: Tensor,
        context: Tensor | None,
        offsets: Offsets | None = None,
    ) -> Tensor:
        """Return (G or 1, R, W) embeddings plus positions of a flat list of R sources."""

    def project(self, x: Tensor) -> Tensor:
        """Return features of the joint space for (..., W) states."""


def is_packable_block(block: nn.Module) -> bool:
    """Tell whether a block is a plain pre-norm residual block whose attention is ``nn.MultiheadAttention``."""
    attention = getattr(block, "attn", None)
    return (
        type(block).__name__ == "ResidualAttentionBlock"
        and isinstance(attention, nn.MultiheadAttention)
        and attention.in_proj_weight is not None
        and attention.bias_k is None
        and not hasattr(block, "ln_1_kv")
    )


def encode_packed(
    tower: PackableTower,
    layout: PromptLayout,
    context: Tensor | None,
    deep: DeepPrompts,
    adapters: Adapters | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """Compute (G, C, d) features; arguments as in :meth:`vlprompt.backbones.text.TextTower.encode`, with a group axis.

    When the activations of all classes would exceed ``tower.memory``, tiles (and groups) are processed in
    chunks whose activations are recomputed in the backward pass.
    """
    tiles = layout.tiles
    edits = [edit_of(adapter) for adapter in adapters or [None] * tower.layers]
    places = torch.arange(layout.shared)
    added = None if offsets is None else (layout.prefix_offsets, offsets)
    prefix = tower.assemble(layout.prefix, layout.prefix_slots, places, context, added)
    past = _run_prefix(tower, prefix, layout.prefix_slots, deep, edits)
    added = None if offsets is None else (tiles.offsets, offsets)
    places = tiles.positions.flatten()
    remainders = tower.assemble(tiles.sources.flatten(), tiles.slots, places, context, added)
    groups = cast(int, torch.sym_max(remainders.shape[0], prefix.shape[0]))
    for rows in (*deep.values(), *(keys for keys, _ in past)):
        groups = cast(int, torch.sym_max(groups, rows.shape[0]))
    group_slices, row_slices = _chunks(tower, groups, tiles)
    keep_graph = torch.is_grad_enabled() and len(group_slices) * len(row_slices) > 1

    def run(group: slice, rows: slice) -> Tensor:
        arguments = (tower, remainders, tiles, past, deep, edits, group, rows)
        return (
            checkpoint(_run_tiles, *arguments, use_reentrant=False) if keep_graph else _run_tiles(*arguments)
        )

    ends = torch.cat([torch.cat([run(g, r) for r in row_slices], dim=1) for g in group_slices])
    return tower.project(ends[:, tiles.end_slots.to(ends.device)])


def _chunks(tower: PackableTower, groups: int, tiles: Tiles) -> tuple[list[slice], list[slice]]:
    """Cut groups and tiles into slices whose activations stay below ``tower.memory`` bytes."""
    count, size = tiles.sources.shape
    if (
        torch.compiler.is_compiling()
    ):  # a traced graph has any number of groups, and its compiler plans its memory
        return [slice(0, groups)], [slice(0, count)]

    # Per token and layer autograd keeps about 17 widths: norms, q, k, v, attention, and three of the 4x MLP.
    token_bytes = tower.layers * tower.width * 17 * 4
    most = max(1, tower.memory // (token_bytes * size))
    return _slices(groups, max(1, most // count)), _slices(count, most)


def _slices(total: int, step: int) -> list[slice]:
    return [slice(i, min(i + step, total)) for i in range(0, total, step)]


def run_block(block: Any, x: Tensor, adapter: Adapter | None, mask: Tensor | None = None) -> Tensor:
    """Run a whole packable block on (B, R, W); ``mask`` (R, R) is added to attention's logits."""
    edit = edit_of(adapter)
    normed = edit.norm_first(block.ln_1, x)
    query, key, value = _heads(block.attn, normed, edit.attention)
    key, value = edit.extend(key, value)
    if mask is not None and edit.keys_in_front:
        mask = F.pad(mask, (edit.keys_in_front, 0))
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return _finish(block, x, attended.transpose(1, 2).flatten(2), edit, normed)


@contextmanager
def quick_attention(blocks: Iterable[Any]) -> Iterator[None]:
    """While open, the attention of packable blocks makes its graph in a way whose backward pass is fast.

    Where something needs a gradient, torch's own attention turns tokens and images around before it projects them.
    Its products then go image by image: a quarter of an image tower's step in float32, most of it in bfloat16.

    Args:
        blocks: Of an image tower, whose tokens look at each other without a mask.
    """
    changes = (
        torch.is_grad_enabled() and not torch.compiler.is_compiling()
    )  # a traced graph has layouts of its own
    attentions = [block.attn for block in blocks if is_packable_block(block)] if changes else []
    for attention in attentions:
        attention.forward = partial(_look_at_itself, attention)
    try:
        yield
    finally:
        for attention in attentions:
            del attention.forward  # the class's own again


def _look_at_itself(
    attention: Any, x: Tensor, *arguments: Any, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """Stand for the ``forward`` of an attention whose queries, keys and values are the same (B, R, W) tokens."""
    weights = (attention.in_proj_weight, attention.out_proj.weight)
    if not (x.requires_grad or any(weight.requires_grad for weight in weights)):
        return nn.MultiheadAttention.forward(attention, x, *arguments, **options)

    query, key, value = _heads(attention, x, None)
    attended = F.scaled_dot_product_attention(query, key, value)
    return attention.out_proj(attended.transpose(1, 2).flatten(2)), None


def _run_prefix(
    tower: PackableTower, x: Tensor, slots: Slots, deep: DeepPrompts, edits: Edits
) -> list[KeyValue]:
    """Run the shared beginning through all blocks; return every block's keys and values, each (G, H, P, dh).

    Tokens that edits bring along stand in this beginning: behind its first token, so every sentence looks at them.
    So do a block's further keys and values, in front of it all.
    """
    past: list[KeyValue] = []
    has_tokens = False
    for i, (block, edit) in enumerate(zip(tower.blocks, edits, strict=True)):
        x = enter_tokens(_insert(x, slots, deep, i), edit, at=1, is_first=not has_tokens)
        has_tokens = has_tokens or edit.tokens is not None
        normed = edit.norm_first(block.ln_1, x)

        if i == tower.layers - 1:  # nobody reads its output, only its keys and values
            _, key, value = _heads(block.attn, normed, edit.attention, query=False)
            past.append(edit.extend(key, value))
            break

        query, key, value = _heads(block.attn, normed, edit.attention)
        key, value = edit.extend(key, value)
        past.append((key, value))
        attended = _look_back(query, key, value, edit.keys_in_front) if x.shape[1] else query
        x = _finish(block, x, attended.transpose(1, 2).flatten(2), edit, normed)

    return past


def _look_back(query: Tensor, key: Tensor, value: Tensor, in_front: int) -> Tensor:
    """Causal attention of (G or 1, H, P, dh) queries over (G, H, M + P, dh) keys; all see the M in front."""
    if not in_front:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)

    tokens = query.shape[2]
    mask = torch.ones(tokens, in_front + tokens, dtype=torch.bool, device=query.device).tril(in_front)
    query = query.expand(key.shape[0], -1, -1, -1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def _run_tiles(
    tower: PackableTower,
    remainders: Tensor,
    tiles: Tiles,
    past: list[KeyValue],
    deep: DeepPrompts,
    edits: Edits,
    group: slice,
    rows: slice,
) -> Tensor:
    """Run some tiles for some groups; return (g, r * E, Dt) states of the sentence ends, before the final norm."""
    size = tiles.sources.shape[1]
    window = slice(rows.start * size, rows.stop * size)
    x = _pick(remainders, group)[:, window]
    slots = tiles.slots.window(window.start, window.stop)
    mask = tiles.mask[rows].to(x.device)
    deep = {block: _pick(prompts, group) for block, prompts in deep.items()}

    masks = _grown_masks(mask, edits)

    for i, (block, edit) in enumerate(zip(tower.blocks[:-1], edits[:-1], strict=True)):
        x = _insert(x, slots, deep, i)
        normed = edit.norm_first(block.ln_1, x)
        query, key, value = _heads(block.attn, normed, edit.attention)
        x = _finish(block, x, _attend(query, key, value, past[i], group, masks[i]), edit, normed)

    x = _insert(x, slots, deep, tower.layers - 1)
    end_rows = tiles.end_rows[rows].to(x.device)
    return _last_block(tower.blocks[-1], x, end_rows, past[-1], edits[-1], group, masks[-1])


def _grown_masks(mask: Tensor, edits: Edits) -> list[Tensor]:
    """Return every block's mask: the beginning is longer by what was brought along, and all look at it."""
    count = entered_tokens(edits)
    first = next((i for i, edit in enumerate(edits) if edit.tokens is not None), len(edits))
    further = [edit.keys_in_front + (count if i >= first else 0) for i, edit in enumerate(edits)]
    grown = {more: F.pad(mask, (more, 0), value=True) if more else mask for more in set(further)}
    return [grown[more] for more in further]


def _last_block(
    block: Any,
    x: Tensor,
    end_rows: Tensor,
    past: KeyValue,
    edit: BlockEdit,
    group: slice,
    mask: Tensor,
) -> Tensor:
    """Run the last block for the sentence ends only."""
    count = len(end_rows)
    size = mask.shape[2]
    flat = (end_rows + size * torch.arange(count, device=x.device)[:, None]).flatten()
    normed = edit.norm_first(block.ln_1, x)
    _, key, value = _heads(block.attn, normed, edit.attention, query=False)
    ends = x[:, flat]
    normed_ends = normed[:, flat]
    weight = block.attn.in_proj_weight
    bias = block.attn.in_proj_bias
    width = x.shape[-1]
    query = F.linear(normed_ends, weight[:width], None if bias is None else bias[:width])

    if edit.attention is not None:
        query = query + edit.attention(normed_ends)[..., :width].to(query.dtype)

    query = _split(query, block.attn.num_heads)
    mask = mask.gather(2, end_rows[:, None, :, None].expand(-1, 1, -1, mask.shape[-1]))
    return _finish(block, ends, _attend(query, key, value, past, group, mask), edit, normed_ends)


def _attend(query: Tensor, key: Tensor, value: Tensor, past: KeyValue, group: slice, mask: Tensor) -> Tensor:
    """Attention of packed tokens over [shared beginning | own tile].

    Args:
        query: (g, H, r * Q, dh) with Q queries per tile.
        key: (g, H, r * S, dh).
        value: (g, H, r * S, dh).
        past: This block's (G, H, P, dh) keys and values of the shared beginning.
        group: Which of the G groups.
        mask: (r, 1, Q, P + S), True where a query may look.

    Returns:
        (g, r * Q, W) attended values, heads merged.
    """
    tiles = len(mask)
    shared_key = _pick(past[0], group)
    shared_value = _pick(past[1], group)
    groups = cast(int, torch.sym_max(query.shape[0], shared_key.shape[0]))
    key = _with_past(key, shared_key, tiles, groups)
    value = _with_past(value, shared_value, tiles, groups)
    query = _tile(query, tiles).expand(groups, -1, -1, -1, -1)
    out = F.scaled_dot_product_attention(
        query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1), attn_mask=mask.repeat(groups, 1, 1, 1)
    )

    return out.unflatten(0, (groups, tiles)).permute(0, 1, 3, 2, 4).flatten(3).flatten(1, 2)


def _tile(x: Tensor, tiles: int) -> Tensor:
    """(g, H, r * S, dh) -> (g, r, H, S, dh)."""
    return x.unflatten(2, (tiles, -1)).transpose(1, 2)


def _with_past(remainders: Tensor, shared: Tensor, tiles: int, groups: int) -> Tensor:
    """Put the shared keys (or values) in front of every tile's own: (groups, r, H, P + S, dh)."""
    remainders = _tile(remainders, tiles).expand(groups, -1, -1, -1, -1)
    shared = shared[:, None].expand(groups, tiles, -1, -1, -1)
    return torch.cat([shared, remainders], dim=3)


def _heads(
    attention: Any, normed: Tensor, adapter: AttentionAdapter | None, query: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Project (G, R, W) to q, k, v of (G, H, R, dh); without queries the first of the three is k again."""
    weight = attention.in_proj_weight
    bias = attention.in_proj_bias
    width = normed.shape[-1]

    if not query:
        weight = weight[width:]
        bias = None if bias is None else bias[width:]

    projected = F.linear(normed, weight, bias)
    if adapter is not None:
        projected = projected + adapter(normed)[..., -projected.shape[-1] :].to(projected.dtype)

    parts = [_split(t, attention.num_heads) for t in projected.split(width, dim=-1)]
    return parts[0], parts[-2], parts[-1]


def _split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _finish(block: Any, x: Tensor, attended: Tensor, edit: BlockEdit, normed: Tensor) -> Tensor:
    """Attention's output projection, residuals, MLP, and what stands beside the block."""
    x = x + block.ls_1(edit.follow_attention(normed, block.attn.out_proj(attended)))
    x = x + block.ls_2(_mlp(block.mlp, edit.norm_second(block.ln_2, x)))
    return edit.add_parallel(x, normed)


def _mlp(mlp: Any, x: Tensor) -> Tensor:
    hidden = mlp.c_fc(x)
    if type(mlp.gelu).__name__ == "QuickGELU":  # x sigmoid(1.702 x) through one fused kernel instead of three
        return mlp.c_proj(F.silu(hidden * 1.702) * (1 / 1.702))
    return mlp.c_proj(mlp.gelu(hidden))


def _insert(x: Tensor, slots: Slots, deep: DeepPrompts, block: int) -> Tensor:
    """Replace the states at learned places by this block's own prompts, if it has any."""
    return insert_rows(x, slots, deep[block]) if block in deep else x


def _pick(x: Tensor, group: slice) -> Tensor:
    """Take some groups, unless all groups share one entry."""
    return x if x.shape[0] == 1 else x[group]
