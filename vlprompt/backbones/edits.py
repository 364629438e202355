"""What is learned inside a tower's blocks, beside their frozen weights.

An adapter of a tower is either a function that joins a block's attention (:data:`AttentionAdapter`), or a
:class:`BlockEdit`, which can also stand beside the block, shift its norms, and bring tokens along. Where a block has
none, it runs as it always does, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlprompt.core.errors import VLPromptError

__all__ = [
    "Adapter",
    "AttentionAdapter",
    "BlockEdit",
    "NormDelta",
    "attention_parts",
    "edit_of",
    "edited_blocks",
    "enter_tokens",
    "entered_tokens",
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
    """

    attention: AttentionAdapter | None = None
    parallel: Callable[[Tensor], Tensor] | None = None
    first_norm: NormDelta | None = None
    second_norm: NormDelta | None = None
    tokens: Tensor | None = None

    def norm_first(self, norm: Any, x: Tensor) -> Tensor:
        """Return what the norm before attention makes of (..., W)."""
        return norm(x) if self.first_norm is None else self.first_norm(norm, x)

    def norm_second(self, norm: Any, x: Tensor) -> Tensor:
        """Return what the norm before the MLP makes of (..., W)."""
        return norm(x) if self.second_norm is None else self.second_norm(norm, x)

    def add_parallel(self, x: Tensor, normed: Tensor) -> Tensor:
        """Return a block's output (..., W) with what stands beside the block; ``normed`` is its normed input."""
        return x if self.parallel is None else x + self.parallel(normed).to(x.dtype)

    @property
    def changes_block(self) -> bool:
        """Whether the block runs otherwise than it would with other tokens alone."""
        return any(
            part is not None for part in (self.attention, self.parallel, self.first_norm, self.second_norm)
        )


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
    """While open, blocks that another library runs are edited: their norms, and what stands beside them."""
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
            norms = norms_of(block)
            if norms is None or edit.parallel is None:
                continue
            keep, add = _standing_beside(edit)
            for handle in (norms[0].register_forward_hook(keep), block.register_forward_hook(add)):
                stack.callback(handle.remove)
        yield


def _shifting(delta: NormDelta) -> Callable[..., Tensor]:
    return lambda norm, inputs, _: delta(norm, inputs[0])


def _standing_beside(edit: BlockEdit) -> tuple[Callable[..., None], Callable[..., Tensor]]:
    """Return a hook of the block's first norm that keeps its output, and one of the block that adds what is beside."""
    kept: list[Tensor] = []

    def keep(_: Any, __: Any, output: Tensor) -> None:
        kept.append(output)

    def add(_: Any, __: Any, output: Tensor) -> Tensor:
        return edit.add_parallel(output, kept.pop())

    return keep, add
