"""States of an image before its first block, with the maps of a convolutional stem where a decoder reads them."""

from __future__ import annotations

from torch import Tensor

from vlprompt.backbones.taps import first_state, stem_maps
from vlprompt.backbones.vision import VisionTower
from vlprompt.core.errors import BackboneError
from vlprompt.segmentation.base import Frozen

__all__ = ["require_maps", "stem_states"]


def require_maps(widths: tuple[int, ...]) -> None:
    """Refuse a tower without maps below its patches.

    Args:
        widths: Of :func:`vlprompt.backbones.taps.fine_widths`.

    Raises:
        BackboneError: If there are none.
    """
    if not widths:
        raise BackboneError(
            "fine=true reads the maps of a convolutional stem, and this image tower has none. What works: photo-vit, "
            "or leave it out."
        )


def stem_states(tower: VisionTower, images: Tensor, fine: bool) -> Frozen:
    """Return ``hidden``, the tower's first state, and ``fine0``, ``fine1``, ..., the maps of its stem, finest first.

    Args:
        tower: A ViT.
        images: (B, 3, H, W) preprocessed pixels.
        fine: Whether the maps are read.
    """
    if not fine:
        return {"hidden": first_state(tower, images)}

    *maps, patches = stem_maps(tower, images)
    states = {f"fine{i}": x.float() for i, x in enumerate(maps)}
    return {**states, "hidden": first_state(tower, images, patches)}
