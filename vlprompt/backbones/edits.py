"""What is learned inside a tower's blocks, beside their frozen weights.

An adapter of a tower is either a function that joins a block's attention (:data:`AttentionAdapter`), or a
:class:`BlockEdit`, which can also stand beside the block, follow its attention, shift its norms, and bring keys and
values or whole tokens along. Where a block has none, it runs as it always does, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlprompt.core.errors import VLPromptError

__all__ = [
    "Adapter",
    "AttentionAdapter",
    "BlockEdit",
    "KeysValues",
    "NormDelta",
    "attention_parts",
    "check_keys_values",
    "edit_of",
    "edited_blocks",
    "enter_tokens",
    "entered_tokens",
    "keys_values_sets",
    "norms_of",
    "shifted_norms",
]

# A function of a block's normed input (..., W) whose (..., 3 W) result is added to the projected queries, keys
# and values. It says what an update of the weight would (LoRA), and what none can: dropout before the update.
AttentionAdapter = Callable[[Tensor], Tensor]


class NormDelta(nn.Module):
    """A learned shift of a LayerNorm: its scale becomes gamma + d_gamma, its offset beta + d_beta; 0 at the start.

    Args:
        width: W of the norm.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, norm: nn.LayerNorm, x: Tensor) -> Tensor:
        """Return what the shifted norm makes of (..., W).

        It is computed in the shift's own float32, since half precision would round a small shift away.
        """
        weight = self.weight if norm.weight is None else norm.weight.to(self.weight.dtype) + self.weight
        bias = self.bias if norm.bias is None else norm.bias.to(self.bias.dtype) + self.bias
        return F.layer_norm(x.to(weight.dtype), norm.normalized_shape, weight, bias, norm.eps).to(x.dtype)


@dataclass(frozen=True)
class KeysValues:
    """Keys and values that a block's tokens look at beside their own; they ask nothing and go nowhere.

    They stand in front of the block's own keys and values as they are: not projected, normed or turned by a place.
    Also known as prefix tuning (Li and Liang, ACL 2021, arXiv 2101.00190, section 4).

    Attributes:
        keys: (M, W) or (B, M, W): one set for all, or one for each image; in a text tower for each of G groups.
        values: Of the keys' shape.
    """

    keys: Tensor
    values: Tensor

    def in_front(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return (B, H, M + R, dh) keys and values of (B, H, R, dh) ones; B grows from 1 if there are more sets."""
        return _in_front(self.keys, key), _in_front(self.values, value)

    def repeated(self, count: int) -> KeysValues:
        """Return every set ``count`` times, one after the other."""
        if self.keys.dim() == 2:
            return self
        return KeysValues(self.keys.repeat_interleave(count, 0), self.values.repeat_interleave(count, 0))


@dataclass(frozen=True)
class BlockEdit:
    """What is learned in one block.

    Attributes:
        attention: Joins queries, keys and values.
        parallel: A function of the block's normed input (..., W); its (..., W) result is added to the block's output.
        first_norm: Shift of the norm before attention.
        second_norm: Shift of the norm before the MLP.
        tokens: (K, W) that stand behind the tower's first token (its class or start token) from this block on. They
            have no positions. Those of a further block take the place of what has become of the earlier ones, so all
            blocks of a tower bring the same number.
        after_attention: A function of the block's normed input (..., W) and of attention's output (..., W) behind its
            output projection. Its (..., W) result takes the output's place, before LayerScale and the residual. It
            sees tokens in any order and number, so it works on each by itself.
        keys_values: What tokens look at beside each other; in a causal tower every token does.
    """

    attention: AttentionAdapter | None = None
    parallel: Callable[[Tensor], Tensor] | None = None
    first_norm: NormDelta | None = None
    second_norm: NormDelta | None = None
    tokens: Tensor | None = None
    after_attention: Callable[[Tensor, Tensor], Tensor] | None = None
    keys_values: KeysValues | None = None

    def norm_first(self, norm: Any, x: Tensor) -> Tensor:
        """Return what the norm before attention makes of (..., W)."""
        return norm(x) if self.first_norm is None else self.first_norm(norm, x)

    def norm_second(self, norm: Any, x: Tensor) -> Tensor:
        """Return what the norm before the MLP makes of (..., W)."""
        return norm(x) if self.second_norm is None else self.second_norm(norm, x)

    def add_parallel(self, x: Tensor, normed: Tensor) -> Tensor:
        """Return a block's output (..., W) with what stands beside the block; ``normed`` is its normed input."""
        return x if self.parallel is None else x + self.parallel(normed).to(x.dtype)

    def follow_attention(self, normed: Tensor, attended: Tensor) -> Tensor:
        """Return what comes of attention's output (..., W); ``normed`` is what attention has read."""
        if self.after_attention is None:
            return attended
        return self.after_attention(normed, attended).to(attended.dtype)

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Return a block's (B, H, R, dh) keys and values with what stands in front of them."""
        return (key, value) if self.keys_values is None else self.keys_values.in_front(key, value)

    @property
    def keys_in_front(self) -> int:
        """M, keys that stand in front of the block's own."""
        return 0 if self.keys_values is None else self.keys_values.keys.shape[-2]

    @property
    def changes_attention(self) -> bool:
        """Whether something enters attention or follows it, other than an adapter of its projections."""
        return self.after_attention is not None or self.keys_values is not None

    @property
    def changes_block(self) -> bool:
        """Whether the block runs otherwise than it would with other tokens alone."""
        parts = (self.attention, self.parallel, self.first_norm, self.second_norm)
        return self.changes_attention or any(part is not None for part in parts)


Adapter = AttentionAdapter | BlockEdit
_NOTHING = BlockEdit()


def edit_of(adapter: Adapter | None) -> BlockEdit:
    """Return an adapter as an edit."""
    if adapter is None:
        return _NOTHING
    return adapter if isinstance(adapter, BlockEdit) else BlockEdit(attention=adapter)


def attention_parts(adapters: Sequence[Adapter | None]) -> list[AttentionAdapter | None]:
    """Return what of the adapters joins attention."""
    return [edit_of(adapter).attention for adapter in adapters]


def entered_tokens(adapters: Sequence[Adapter | None] | None) -> int:
    """Return K, how many tokens the edits of a tower bring along; 0 if none does.

    Raises:
        VLPromptError: If blocks bring different numbers.
    """
    brought = [edit_of(adapter).tokens for adapter in adapters or ()]
    counts = sorted({len(tokens) for tokens in brought if tokens is not None})
    if len(counts) > 1:
        raise VLPromptError(
            f"blocks of one tower bring {' and '.join(map(str, counts))} tokens: give all the same."
        )
    return counts[0] if counts else 0


def enter_tokens(x: Tensor, edit: BlockEdit, at: int, is_first: bool) -> Tensor:
    """Return (B, R, W) states with an edit's tokens at their place, which grow by K where they are the first.

    Args:
        x: States before the block.
        edit: Of the block; one without tokens changes nothing.
        at: Tokens before them.
        is_first: Whether no earlier block has brought tokens.
    """
    if edit.tokens is None:
        return x
    count = len(edit.tokens)
    rest = at if is_first else at + count
    tokens = edit.tokens.to(x.dtype).expand(x.shape[0], -1, -1)
    return torch.cat([x[:, :at], tokens, x[:, rest:]], dim=1)


def check_keys_values(edits: Sequence[BlockEdit], width: int, sets: Sequence[int] = ()) -> None:
    """Refuse keys and values that don't fit a tower.

    Args:
        edits: One per block.
        width: W of the tower.
        sets: How many sets there may be; empty for any number.

    Raises:
        VLPromptError: If keys and values differ in shape, have another width, or there are as many sets as don't fit.
    """
    for number, edit in enumerate(edits):
        if edit.keys_values is None:
            continue

        shape = tuple(edit.keys_values.keys.shape)
        if shape != tuple(edit.keys_values.values.shape) or len(shape) not in (2, 3):
            raise VLPromptError(
                f"block {number}: keys of shape {shape}, values of {tuple(edit.keys_values.values.shape)}; both are "
                "(M, W) or (B, M, W)."
            )
        if shape[-1] != width:
            raise VLPromptError(
                f"block {number}: keys and values have width {shape[-1]}, the tower has {width}."
            )
        if sets and len(shape) == 3 and shape[0] not in sets:
            raise VLPromptError(
                f"block {number}: {shape[0]} sets of keys and values for a batch of {sets[-1]} images."
            )


def keys_values_sets(adapters: Sequence[Adapter | None] | None) -> int | None:
    """Return G, how many sets of keys and values the edits of a tower bring; None if they bring no (G, M, W).

    Raises:
        VLPromptError: If blocks bring different numbers of sets, other than 1.
    """
    brought = [edit_of(adapter).keys_values for adapter in adapters or ()]
    counts = sorted({len(own.keys) for own in brought if own is not None and own.keys.dim() == 3})
    if len([count for count in counts if count > 1]) > 1:
        raise VLPromptError(
            f"blocks of one tower bring {' and '.join(map(str, counts))} sets of keys and values: give all the same."
        )
    return counts[-1] if counts else None


def norms_of(block: Any) -> tuple[nn.LayerNorm, nn.LayerNorm] | None:
    """Return the norms before attention and before the MLP of a pre-norm block, or None if it is none."""
    for names in (("ln_1", "ln_2"), ("norm1", "norm2")):
        found = [getattr(block, name, None) for name in names]
        first, second = found
        # Where a norm stands behind its part, it is not what the part reads.
        if (
            isinstance(first, nn.LayerNorm)
            and isinstance(second, nn.LayerNorm)
            and "Post" not in type(block).__name__
        ):
            return first, second
    return None


@contextmanager
def shifted_norms(shifts: Sequence[tuple[nn.Module, NormDelta]]) -> Iterator[None]:
    """While open, norms that their tower calls by itself are shifted."""
    with ExitStack() as stack:
        for norm, delta in shifts:
            handle = norm.register_forward_hook(_shifting(delta))
            stack.callback(handle.remove)
        yield


@contextmanager
def edited_blocks(blocks: Sequence[Any], edits: Sequence[BlockEdit]) -> Iterator[None]:
    """While open, blocks that another library runs are edited, but for what joins their attention's inside."""
    shifts = []
    with ExitStack() as stack:
        for block, edit in zip(blocks, edits, strict=True):
            norms = norms_of(block)
            if norms is None:
                continue
            shifts += [
                (n, d)
                for n, d in zip(norms, (edit.first_norm, edit.second_norm), strict=True)
                if d is not None
            ]

        stack.enter_context(shifted_norms(shifts))
        for block, edit in zip(blocks, edits, strict=True):
            if edit.after_attention is not None:
                handle = block.attn.register_forward_hook(_following(edit))
                stack.callback(handle.remove)

            norms = norms_of(block)
            if norms is None or edit.parallel is None:
                continue
            keep, add = _standing_beside(edit)
            for handle in (norms[0].register_forward_hook(keep), block.register_forward_hook(add)):
                stack.callback(handle.remove)
        yield


def _in_front(rows: Tensor, own: Tensor) -> Tensor:
    """Return (B, H, M + R, dh): (M, W) or (B', M, W) rows, cut into heads, before (B'', H, R, dh)."""
    rows = rows if rows.dim() == 3 else rows[None]
    heads = rows.to(own.dtype).unflatten(-1, (own.shape[1], -1)).transpose(1, 2)
    batch = cast(int, torch.sym_max(heads.shape[0], own.shape[0]))
    return torch.cat([heads.expand(batch, -1, -1, -1), own.expand(batch, -1, -1, -1)], dim=2)


def _shifting(delta: NormDelta) -> Callable[..., Tensor]:
    return lambda norm, inputs, _: delta(norm, inputs[0])


def _following(edit: BlockEdit) -> Callable[..., Tensor]:
    return lambda _, inputs, output: edit.follow_attention(inputs[0], output)


def _standing_beside(edit: BlockEdit) -> tuple[Callable[..., None], Callable[..., Tensor]]:
    """Return a hook of the block's first norm that keeps its output, and one of the block that adds what is beside."""
    kept: list[Tensor] = []

    def keep(_: Any, __: Any, output: Tensor) -> None:
        kept.append(output)

    def add(_: Any, __: Any, output: Tensor) -> Tensor:
        return edit.add_parallel(output, kept.pop())

    return keep, add
