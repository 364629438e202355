"""Local tokens: what each place of an image says in the joint space, and how much it matters to the whole."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vlprompt.backbones.packed import is_packable_block
from vlprompt.backbones.vision import Images, TokenStates, VisionTower
from vlprompt.core.errors import BackboneError, VLPromptError

__all__ = ["LocalTokens", "local_tokens", "require_local_tokens"]


@dataclass(frozen=True)
class LocalTokens:
    """The tokens of a frozen tower's last block, without a graph.

    Attributes:
        states: (B, 1 + N, W) behind the last block, from which the tower pools its own feature.
        features: (B, 1 + N, d), not normalised, float32: the tower's own feature, then what its norm and projection
            make of each patch by itself.
        salience: (B, N), how much each patch matters: how much the class token looks at it in the last block, mean of
            the heads; of a tower that pools the mean of its patches, their cosine with it. float32.
    """

    states: TokenStates
    features: Tensor
    salience: Tensor


def require_local_tokens(tower: VisionTower) -> None:
    """Raise BackboneError with the reason if a tower's tokens can't be read so."""
    reason = _reason_against(tower)
    if reason:
        raise BackboneError(
            f"local tokens of this backbone's image tower can't be read: {reason}. What works here: plug-ins that read "
            "the image's own feature alone (dept, dpc)."
        )


@torch.no_grad()
def local_tokens(tower: VisionTower, images: Images) -> LocalTokens:
    """Return the local tokens of images.

    Args:
        tower: See :func:`require_local_tokens`.
        images: (B, 3, H, W) preprocessed pixels, or what the blocks below the last have made of them.

    Raises:
        BackboneError: If the tower's tokens can't be read so.
        VLPromptError: If the images have gone through the last block already.
    """
    require_local_tokens(tower)
    stream = tower.stream
    assert stream is not None  # there is a reason where there is none
    last = tower.layers - 1
    begun = images if isinstance(images, TokenStates) else tower.states(images)
    if begun.blocks > last:
        raise VLPromptError(
            f"local tokens are read in block {last}, and {begun.blocks} have run on these images."
        )

    x = begun.tokens.to(tower.dtype)
    x = x if begun.blocks else stream.norm_before(x)
    for number in range(begun.blocks, last):
        x = stream.run(number, x, None)
    before = x
    x = stream.run(last, x, None)

    normed = stream.norm_after(x[:, 1:])
    projection = tower.visual.proj
    patches = (normed if projection is None else normed @ projection).float()
    feature = tower.finish(x)[:, None]
    if tower.visual.pool_type == "avg":  # nobody reads its class token
        salience = F.cosine_similarity(patches, feature, dim=-1)
    else:
        salience = _attention_of_class_token(tower.blocks[last], before)
    return LocalTokens(TokenStates(x, tower.layers), torch.cat([feature, patches], dim=1), salience)


def _attention_of_class_token(block: torch.nn.Module, x: Tensor) -> Tensor:
    """Return (B, N) weights of the patches in the class token's attention, mean of the heads.

    Args:
        block: A packable one.
        x: (B, 1 + N, W) states before it.
    """
    attention: torch.nn.MultiheadAttention = block.attn  # type: ignore[assignment]  # it is packable
    width = x.shape[-1]
    heads = attention.num_heads
    weight = attention.in_proj_weight
    bias = attention.in_proj_bias
    normed = block.ln_1(x)  # type: ignore[operator]

    query = F.linear(normed[:, :1], weight[:width], bias[:width] if bias is not None else None)
    key = F.linear(normed, weight[width : 2 * width], bias[width : 2 * width] if bias is not None else None)
    query, key = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key))
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5  # (B, H, 1, 1 + N)
    return scores.float().softmax(-1).mean(1)[:, 0, 1:]


def _reason_against(tower: VisionTower) -> str:
    if tower.reason is not None:
        return tower.reason
    if tower.kind != "vit" or not all(is_packable_block(block) for block in tower.blocks):
        return "its blocks don't run torch's own attention, so nobody sees where the class token looks"
    if tower.visual.pool_type not in ("tok", "avg") or getattr(tower.visual, "attn_pool", None) is not None:
        return "its feature is pooled by attention, not from the class token or the mean"
    return ""
