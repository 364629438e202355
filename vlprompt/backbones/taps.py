"""What an image tower knows of every place of an image: token states after chosen blocks, or a pyramid of maps.

Images may have any size: positions are interpolated, and sides that are no multiple of the patch are padded.
Visual prompts enter at the end of the sequence, before the pre-norm (``append`` of :mod:`vlprompt.backbones.vision`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlprompt.backbones.packed import is_packable_block, run_block
from vlprompt.backbones.stem import MapStem
from vlprompt.backbones.streams import with_places_without_rotation
from vlprompt.backbones.vision import VisionTower
from vlprompt.core.errors import BackboneError, VLPromptError

__all__ = [
    "Taps",
    "after_block",
    "dense_embeddings",
    "fine_widths",
    "first_state",
    "grid_of",
    "joint_tokens",
    "padded",
    "patch_of",
    "relative_taps",
    "resized_positions",
    "run_taps",
    "stem_maps",
]


@dataclass(frozen=True)
class Taps:
    """States of a tower's tokens.

    Attributes:
        states: (B, 1 + N, W) after each tapped block, class token first; prompts follow if they were kept.
        pooled: (B, d) projected feature of the whole image, None unless asked for.
    """

    states: tuple[Tensor, ...]
    pooled: Tensor | None


def patch_of(tower: VisionTower) -> int:
    """Return the side of a patch in pixels.

    Raises:
        BackboneError: If the tower has no sequence of one class token and square patches.
    """
    stream = tower.stream
    if stream is None:
        raise BackboneError(f"token states of an image can't be read on this backbone: {tower.reason}.")

    height, width = stream.patch
    if height != width or stream.special != 1:
        raise BackboneError(
            f"dense features need square patches and one class token; this image tower has patches of "
            f"{height} x {width} pixels and {stream.special} class tokens."
        )
    if stream.rotates and stream.native is None:
        raise BackboneError(
            "dense features need places that are learned, or rotary ones of one image size; this image tower makes "
            "rotary ones for every size anew. Use another backbone, for example ViT-B-16."
        )

    return int(height)


def grid_of(tower: VisionTower, size: tuple[int, int]) -> tuple[int, int]:
    """Return (rows, columns) of patches that cover an image of (H, W) pixels."""
    patch = patch_of(tower)
    return -(-size[0] // patch), -(-size[1] // patch)


def padded(images: Tensor, multiple: int) -> Tensor:
    """Continue the last row and column of (B, 3, H, W) until both sides are multiples; a copy only if needed."""
    height, width = images.shape[-2:]
    below = -height % multiple
    right = -width % multiple
    return F.pad(images, (0, right, 0, below), mode="replicate") if below or right else images


def relative_taps(layers: int) -> tuple[int, int, int]:
    """Return CLIPSeg's blocks (3, 6, 9 of 12, counted from 0) at the same relative depth of another tower.

    Raises:
        BackboneError: If the tower has fewer than three blocks.
    """
    if layers < 3:
        raise BackboneError(f"three depths of an image tower are read, this one has {layers} blocks.")
    third, middle, deep = (max(0, round(layers * share) - 1) for share in (1 / 3, 7 / 12, 10 / 12))
    middle = max(middle, third + 1)
    return third, middle, max(deep, middle + 1)


def resized_positions(table: Tensor, grid: tuple[int, int], native: tuple[int, int]) -> Tensor:
    """Interpolate (1 + N, W) learned positions to another grid; the class token keeps its own."""
    if grid == native:
        return table
    patches = table[1:].reshape(1, *native, -1).permute(0, 3, 1, 2).float()
    resized = F.interpolate(patches, size=grid, mode="bicubic", align_corners=False)
    return torch.cat([table[:1], resized.flatten(2).transpose(1, 2)[0].to(table.dtype)])


def fine_widths(tower: VisionTower) -> tuple[int, ...]:
    """Return the channels of the maps that a tower's stem makes before its patches, finest first; () if it has none."""
    stem = tower.visual.conv1 if tower.kind == "vit" else None
    return stem.fine_widths if isinstance(stem, MapStem) else ()


def stem_maps(tower: VisionTower, images: Tensor) -> tuple[Tensor, ...]:
    """Return the maps of a stem, (B, C, h, w) each, finest first; the last one are the patches.

    Args:
        tower: One with :func:`fine_widths`.
        images: (B, 3, H, W) preprocessed pixels of any size.
    """
    return tower.visual.conv1.maps(padded(images, patch_of(tower)).to(tower.dtype))


def first_state(tower: VisionTower, images: Tensor, patches: Tensor | None = None) -> Tensor:
    """Return (B, 1 + N, W): class token and patches with positions, before the pre-norm and any prompt.

    Args:
        tower: A ViT.
        images: (B, 3, H, W) preprocessed pixels of any size.
        patches: The last of :func:`stem_maps` of the same images, if it is there already.

    Raises:
        BackboneError: If the tower has no such sequence.
    """
    patch = patch_of(tower)
    stream = tower.stream
    assert stream is not None  # there is a patch
    images = padded(images, patch).to(tower.dtype)

    if stream.native is not None and images.shape[-2:] != stream.native:  # timm fixes the size as it builds
        raise BackboneError(
            f"this image tower comes from timm and reads {stream.native[0]} x {stream.native[1]} pixels only, got "
            f"{images.shape[-2]} x {images.shape[-1]}. Use the segmenter's preprocess, or a ViT of open_clip's own."
        )
    if stream.kind == "timm_vit":
        return stream.embed(images)[0]

    visual = tower.visual
    x = visual.conv1(images) if patches is None else patches
    grid = (x.shape[2], x.shape[3])
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1), x], dim=1)
    return x + resized_positions(visual.positional_embedding, grid, tuple(visual.grid_size)).to(x.dtype)


def run_taps(
    tower: VisionTower,
    x: Tensor,
    blocks: Sequence[int],
    prompts: Tensor | None = None,
    *,
    pooled: bool = False,
    keep_prompts: bool = False,
) -> Taps:
    """Run the blocks up to the last tap; all states that are returned are float32.

    Args:
        tower: A ViT.
        x: (B, 1 + N, W) from :func:`first_state`.
        blocks: Ascending numbers of the tapped blocks, counted from 0.
        prompts: (J, M, W) or (B, J, M, W): row 0 enters before the first block, row i replaces the prompts' states
            before block i.
        pooled: Run all blocks and return the image's own feature too.
        keep_prompts: Keep the prompts in the states, as they go into the next block (the published code's way).

    Raises:
        VLPromptError: If the prompts don't fit the tower.
    """
    stream = tower.stream
    assert stream is not None  # there is a first state
    rows = None if prompts is None else _checked(tower, prompts, x.shape[0])
    tokens = x.shape[1]
    x = x.to(tower.dtype)

    rotation = stream.native_rotation()
    if rotation is not None and rows is not None:
        rotation = with_places_without_rotation(rotation, rows.shape[2], front=False)

    if rows is not None:
        x = torch.cat([x, rows[:, 0].to(x.dtype)], dim=1)

    x = stream.norm_before(x)
    states: list[Tensor] = []

    last = len(tower.blocks) - 1 if pooled else max(blocks)
    for i, block in enumerate(tower.blocks[: last + 1]):
        x = run_block(block, x, None) if is_packable_block(block) else stream.run(i, x, rotation)
        if not keep_prompts and i in blocks:
            states.append(x[:, :tokens].float())
        if rows is not None and i + 1 < rows.shape[1]:
            x = torch.cat([x[:, :tokens], rows[:, i + 1].to(x.dtype)], dim=1)
        if keep_prompts and i in blocks:
            states.append(x.float())

    return Taps(tuple(states), tower.finish(x[:, :tokens]) if pooled else None)


def dense_embeddings(tower: VisionTower, state: Tensor, patches: int) -> Tensor:
    """Return (B, N, d) unit-length features of patches in the joint space; arguments as of :func:`joint_tokens`."""
    return F.normalize(joint_tokens(tower, state, patches), dim=-1)


def joint_tokens(tower: VisionTower, state: Tensor, patches: int) -> Tensor:
    """Return (B, N, d) features of patches in the joint space, of any length, float32.

    What pools the last block's tokens is applied to each of them by itself (Zhou et al., "Extract Free Dense Labels
    from CLIP", ECCV 2022, section 3.2, without its change of the last attention).

    Args:
        tower: One of open_clip's own ViTs, or one with its layout.
        state: (B, 1 + T, W) tokens after the last block, class token first.
        patches: N; further tokens are left out.
    """
    visual = tower.visual
    tokens = visual.ln_post(state[:, 1 : 1 + patches].to(tower.dtype))
    return (tokens @ visual.proj).float()


def after_block(tower: VisionTower, last: int) -> list[nn.Parameter]:
    """Return the image tower's parameters that no state up to block ``last`` depends on: what makes it pool."""
    visual = tower.visual
    inner = visual if tower.kind == "vit" else visual.trunk
    unread = [p for block in tower.blocks[last + 1 :] for p in block.parameters()]

    for part in (inner, visual):
        for name in ("ln_post", "attn_pool", "norm", "fc_norm", "head"):
            module = getattr(part, name, None)
            unread += list(module.parameters()) if isinstance(module, nn.Module) else []

    projection = getattr(visual, "proj", None)
    return [*unread, *([projection] if isinstance(projection, nn.Parameter) else [])]


def _checked(tower: VisionTower, prompts: Tensor, batch: int) -> Tensor:
    rows: Any = prompts[None] if prompts.dim() == 3 else prompts
    if rows.shape[-1] != tower.width or rows.shape[1] > tower.layers or len(rows) not in (1, batch):
        raise VLPromptError(
            f"visual prompts of shape {tuple(prompts.shape)} don't fit an image tower of {tower.layers} layers and "
            f"width {tower.width} with {batch} images."
        )

    return rows.expand(batch, -1, -1, -1)
