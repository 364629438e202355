"""Lanes: class tokens of their own that run beside the frozen image tower and read what selectors pick from it.

A lane holds a class token and S selectors. Selectors look at the frozen tower's tokens and pick S mixtures of them; the
class token attends to itself, to the mixtures and to learned keys and values, through the frozen weights. The tower's
own tokens never see a lane, so any number of lanes reads one frozen pass (MULTI-LANE; see
:mod:`vlprompt.learners.multi_lane`).

Three facts keep lanes cheap, and are exact: (1) selectors never see the image, so their way up the tower is computed
once, not per image; (2) the weights of a mixture add up to one, so its key is the same mixture of the frozen keys, and
its value that of the values; (3) only the class token's row is read by anyone, so only it has a query and an MLP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlprompt.backbones.edits import norms_of
from vlprompt.backbones.packed import is_packable_block
from vlprompt.backbones.streams import TokenStream
from vlprompt.backbones.vision import Images, TokenStates, VisionTower
from vlprompt.core.errors import BackboneError

__all__ = [
    "BlockInputs",
    "Lane",
    "block_inputs",
    "class_token",
    "lane_features",
    "pools_patches",
    "require_lanes",
    "run_lanes",
]


@dataclass(frozen=True)
class BlockInputs(TokenStates):
    """What the attention of every block reads of some images: all that lanes need of the frozen tower.

    Attributes:
        tokens: (B, L, R, W), behind each block's first norm.
        blocks: L.
    """


@dataclass(frozen=True)
class Lane:
    """What is learned of one lane.

    Attributes:
        selectors: (S, W).
        prompts: (J, 2, M, W) keys and values in front of the lane's own in the first J blocks.
    """

    selectors: Tensor
    prompts: Tensor


class _Block:
    """The parts of a block, by whatever names its library has for them."""

    def __init__(self, block: Any) -> None:
        norms = norms_of(block)
        assert norms is not None  # see require_lanes
        self.first_norm, self.second_norm = norms
        attention = block.attn
        own = is_packable_block(block)
        self.heads = int(attention.num_heads)
        self.weight: Tensor = attention.in_proj_weight if own else attention.qkv.weight
        self.bias: Tensor | None = attention.in_proj_bias if own else attention.qkv.bias
        self.project: nn.Module = attention.out_proj if own else attention.proj
        self.inner: nn.Module = nn.Identity() if own else getattr(attention, "norm", nn.Identity())
        self.first_scale: nn.Module = block.ls_1 if own else block.ls1
        self.second_scale: nn.Module = block.ls_2 if own else block.ls2
        self.mlp: nn.Module = block.mlp

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return three of (..., W) for normed (..., W)."""
        query, key, value = F.linear(x, self.weight, self.bias).chunk(3, dim=-1)
        return query, key, value

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return two of (..., W) for normed (..., W)."""
        width = x.shape[-1]
        bias = None if self.bias is None else self.bias[width:]
        key, value = F.linear(x, self.weight[width:], bias).chunk(2, dim=-1)
        return key, value

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return (..., Q, W) behind the output projection, for (..., Q, W) and (..., K, W)."""
        sets = query.shape[:-2]
        parts = [t.unflatten(-1, (self.heads, -1)).transpose(-2, -3) for t in (query, key, value)]
        parts = [t.flatten(0, -4) for t in parts]  # ONNX knows fused attention of four axes alone
        attended = F.scaled_dot_product_attention(*parts).transpose(-2, -3).flatten(-2).unflatten(0, sets)
        return self.first_scale(self.project(self.inner(attended)))

    def after_attention(self, x: Tensor) -> Tensor:
        """Return (..., W) states behind the MLP and its residual."""
        return x + self.second_scale(self.mlp(self.second_norm(x)))


def require_lanes(tower: VisionTower) -> None:
    """Raise BackboneError with the reason if lanes can't run beside this tower."""
    reason = _reason_against(tower)
    if reason:
        raise BackboneError(
            f"lanes can't run beside this backbone's image tower: {reason}. What works here: session_probe, and "
            "learners that leave the image tower alone (coop, clip_adapter)."
        )


def block_inputs(tower: VisionTower, images: Tensor) -> BlockInputs:
    """Return what the blocks read of (B, 3, H, W) preprocessed images."""
    stream = _stream(tower)
    x = stream.norm_before(stream.embed(images.to(tower.dtype))[0])
    inputs = []

    for number, block in enumerate(map(_Block, tower.blocks)):
        normed = block.first_norm(x)
        inputs.append(normed)
        if number < tower.layers - 1:
            x = block.after_attention(x + block.attend(*block.queries_keys_values(normed)))

    return BlockInputs(torch.stack(inputs, dim=1), tower.layers)


def class_token(tower: VisionTower, *, placed: bool = True) -> Tensor:
    """Return the (W,) state of the class token before the first block: the same for every image.

    Args:
        tower: See :func:`require_lanes`.
        placed: Whether it has its position, as in the tower; False: the token alone.
    """
    visual = tower.visual
    stream = _stream(tower)
    if placed:
        height, width = (visual.image_size,) * 2 if isinstance(visual.image_size, int) else visual.image_size
        black = torch.zeros(
            1, 3, int(height), int(width), dtype=tower.dtype, device=next(visual.parameters()).device
        )
        return stream.norm_before(stream.embed(black)[0])[0, 0]

    token = visual.class_embedding if tower.kind == "vit" else visual.trunk.cls_token
    return stream.norm_before(token.reshape(1, 1, -1).to(tower.dtype))[0, 0]


def run_lanes(tower: VisionTower, images: Images, lanes: Sequence[Lane], start: Tensor | None) -> Tensor:
    """Return (B, T, W) float32 states of the lanes' class tokens after the last block.

    Args:
        tower: See :func:`require_lanes`.
        images: (B, 3, H, W) preprocessed pixels, or what :func:`block_inputs` made of them.
        lanes: T lanes with equally many selectors, prompts and prompted blocks.
        start: (W,) where their class tokens begin, see :func:`class_token`; None: at the mean of the patches that the
            first block reads, for towers that pool patches.
    """
    dtype = tower.dtype
    selectors = torch.stack([lane.selectors for lane in lanes]).to(dtype)
    prompts = torch.stack([lane.prompts for lane in lanes]).to(dtype)  # (T, J, 2, M, W)
    kept = images if isinstance(images, BlockInputs) else None
    batch = images.shape[0] if kept is None else kept.tokens.shape[0]  # type: ignore[union-attr]
    token = None if start is None else start.to(dtype).expand(batch, len(lanes), -1)

    if kept is None:
        stream = _stream(tower)
        x = stream.norm_before(stream.embed(images.to(dtype))[0])  # type: ignore[arg-type]

    for number, block in enumerate(map(_Block, tower.blocks)):
        is_last = number == tower.layers - 1
        if kept is not None:
            normed = kept.tokens[:, number].to(dtype)
            frozen = None
        else:
            normed = block.first_norm(x)
            query, key, value = block.queries_keys_values(normed)
            frozen = (key, value)
            if not is_last:
                x = block.after_attention(x + block.attend(query, key, value))

        if token is None:
            token = normed[:, None, _stream(tower).special :].mean(2).expand(-1, len(lanes), -1)
        own = prompts[:, number] if number < prompts.shape[1] else None
        token = _step(block, token, selectors, normed, frozen, own)
        if not is_last:
            selectors = block.after_attention(selectors + block.first_norm(selectors))

    assert token is not None  # there is at least one block
    return token.float()


def lane_features(tower: VisionTower, states: Tensor, *, projected: bool) -> Tensor:
    """Return (B, T, d) float32 features of the lanes' (B, T, W) states.

    If they are not projected, (B, T, W) behind the last norm.

    Args:
        tower: See :func:`require_lanes`.
        states: Of :func:`run_lanes`.
        projected: Whether they go on into the joint space.
    """
    normed = _stream(tower).norm_after(states.to(tower.dtype))
    if not projected:
        return normed.float()
    if tower.kind == "vit":
        return (normed if tower.visual.proj is None else normed @ tower.visual.proj).float()
    return tower.visual.head(tower.visual.trunk.head(normed)).float()


def _step(
    block: _Block,
    token: Tensor,
    selectors: Tensor,
    normed: Tensor,
    frozen: tuple[Tensor, Tensor] | None,
    prompts: Tensor | None,
) -> Tensor:
    """Run the lanes' class tokens through one block.

    Args:
        block: The block.
        token: (B, T, W).
        selectors: (T, S, W), before the block's norm.
        normed: (B, R, W), what the frozen attention reads.
        frozen: Its keys and values, if they are there; else the mixtures are projected.
        prompts: (T, 2, M, W), or None.
    """
    scores = torch.einsum("tsw,brw->btsr", block.first_norm(selectors), normed)
    weights = (scores / normed.shape[-1] ** 0.5).softmax(-1)
    if frozen is None:
        key, value = block.keys_values(torch.einsum("btsr,brw->btsw", weights, normed))
    else:
        key, value = (torch.einsum("btsr,brw->btsw", weights, part) for part in frozen)

    query, own_key, own_value = (t.unsqueeze(2) for t in block.queries_keys_values(block.first_norm(token)))
    keys = [own_key, key]
    values = [own_value, value]
    if prompts is not None:
        keys.insert(0, prompts[:, 0].expand(token.shape[0], -1, -1, -1))
        values.insert(0, prompts[:, 1].expand(token.shape[0], -1, -1, -1))

    attended = block.attend(query, torch.cat(keys, dim=2), torch.cat(values, dim=2)).squeeze(2)
    return block.after_attention(token + attended)


def _stream(tower: VisionTower) -> TokenStream:
    require_lanes(tower)
    assert tower.stream is not None  # there is a reason where there is none
    return tower.stream


def _reason_against(tower: VisionTower) -> str:
    if tower.reason is not None:
        return tower.reason
    if not tower.stream or not tower.stream.special:
        return "it has no class token"
    if not all(norms_of(block) is not None for block in tower.blocks):
        return "its blocks don't begin with a LayerNorm"
    if tower.stream.rotates:
        return "its keys turn by their place, and a mixture of patches has none"

    for block in tower.blocks:
        own = is_packable_block(block)
        attention = getattr(block, "attn", None)
        layer = getattr(attention, "qkv", None)
        if not own and not (
            isinstance(layer, nn.Linear) and hasattr(block, "ls1") and hasattr(attention, "proj")
        ):
            return "its attention is not one layer for queries, keys and values"
        if any(
            not isinstance(getattr(attention, n, nn.Identity()), nn.Identity) for n in ("q_norm", "k_norm")
        ):
            return "its keys are normed, and a mixture of keys is then no key of a mixture"

    visual = tower.visual
    if tower.kind == "vit":
        has_pool = getattr(visual, "attn_pool", None) is not None or visual.pool_type not in ("tok", "avg")
    else:
        has_pool = visual.trunk.global_pool not in ("token", "avg")
    return "its feature is pooled by attention, not from the class token or the mean" if has_pool else ""


def pools_patches(tower: VisionTower) -> bool:
    """Return whether the tower's feature is the mean of its patches, and not its class token."""
    return (tower.visual.pool_type if tower.kind == "vit" else tower.visual.trunk.global_pool) == "avg"
