"""Maps of three scales from an image tower, each half as fine as the one before: what CRIS' neck reads.

A ModifiedResNet has them (its second, third and last stage, the last one through the attention pool at every place,
with no mean token: Wang et al., CVPR 2022, section 3.1). A ViT has one scale: an early block's map is doubled, a
middle one's kept, and the last block's, projected into the joint space, is halved. On a convolutional stem they are the
stem's last two maps below the patches, and the last block's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from vlprompt.backbones.base import Backbone
from vlprompt.backbones.taps import fine_widths, joint_tokens, patch_of
from vlprompt.core.errors import BackboneError

__all__ = [
    "dense_pool",
    "is_resnet",
    "pyramid_stride",
    "pyramid_widths",
    "resnet_stages",
    "stem_pyramid",
    "vit_maps",
]


def is_resnet(backbone: Backbone) -> bool:
    """Tell whether the image tower is one of CLIP's ModifiedResNets."""
    return type(backbone.vision.visual).__name__ == "ModifiedResNet"


def pyramid_widths(backbone: Backbone, stem: bool = False) -> tuple[int, int, int]:
    """Return the channels of the three maps, finest first.

    Args:
        backbone: Its image tower.
        stem: Read the maps of a ViT's convolutional stem (see :func:`stem_pyramid`).

    Raises:
        BackboneError: If the tower is neither a ModifiedResNet nor a ViT of open_clip's own.
    """
    visual: Any = backbone.vision.visual
    if is_resnet(backbone):
        return visual.layer2[-1].bn3.num_features, visual.layer3[-1].bn3.num_features, backbone.dim

    backbone.vision.require_prompts()

    if backbone.vision.kind != "vit" or visual.proj is None:
        raise BackboneError(
            "maps of three scales need a ModifiedResNet or a ViT of open_clip's own that projects its tokens into the "
            f"joint space; this image tower is {type(getattr(visual, 'trunk', visual)).__name__}. Try ViT-B-16 or RN50."
        )

    if stem:
        fine, middle = fine_widths(backbone.vision)[-2:]
        return fine, middle, backbone.dim
    return backbone.vision.width, backbone.vision.width, backbone.dim


def pyramid_stride(backbone: Backbone, stem: bool = False) -> int:
    """Return the side in pixels of one place of the coarsest map; images are padded to multiples of it."""
    if is_resnet(backbone):
        return 32
    return patch_of(backbone.vision) * (1 if stem else 2)


def resnet_stages(backbone: Backbone, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the second, third and fourth stage of a ModifiedResNet, (B, C, h, w) each, float32."""
    visual: Any = backbone.vision.visual
    second = visual.layer2(visual.layer1(visual.stem(images.to(backbone.vision.dtype))))
    third = visual.layer3(second)
    return second.float(), third.float(), visual.layer4(third).float()


def dense_pool(backbone: Backbone, x: Tensor) -> Tensor:
    """Return (B, d, h, w), float32: the attention pool with every place of the last stage (B, C, h, w) as a query."""
    x = x.to(backbone.vision.dtype)
    pool: Any = backbone.vision.visual.attnpool
    batch, _, height, width = x.shape
    table = pool.positional_embedding
    side = round((len(table) - 1) ** 0.5)
    places = table[1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    x = x + F.interpolate(places, size=(height, width), mode="bicubic", align_corners=False)
    x = x.flatten(2).transpose(1, 2)
    parts = (
        f(x).unflatten(-1, (pool.num_heads, -1)).transpose(1, 2)
        for f in (pool.q_proj, pool.k_proj, pool.v_proj)
    )
    attended = F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)

    return pool.c_proj(attended).transpose(1, 2).reshape(batch, -1, height, width).float()


def vit_maps(
    backbone: Backbone, states: Sequence[Tensor], grid: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return three maps of a ViT from an early, a middle and the last block's (B, 1 + N, W) tokens."""
    patches = grid[0] * grid[1]
    early, middle = (x[:, 1 : 1 + patches] for x in states[:2])
    last = joint_tokens(backbone.vision, states[2], patches)
    fine, medium, coarse = (x.transpose(1, 2).unflatten(2, grid) for x in (early, middle, last))
    doubled = F.interpolate(fine, scale_factor=2.0, mode="bilinear", align_corners=False)
    return doubled, medium, F.avg_pool2d(coarse, 2)


def stem_pyramid(
    backbone: Backbone, maps: Sequence[Tensor], last: Tensor, grid: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return three maps of a ViT on a convolutional stem, finest first.

    Args:
        backbone: Its image tower.
        maps: Of the stem below the patches, finest first, see :func:`vlprompt.backbones.taps.stem_maps`.
        last: (B, 1 + N, W) tokens of the last block.
        grid: (rows, columns) of patches.
    """
    coarse = joint_tokens(backbone.vision, last, grid[0] * grid[1])
    return maps[-2], maps[-1], coarse.transpose(1, 2).unflatten(2, grid)
