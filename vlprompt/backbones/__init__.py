"""CLIP-family towers behind one interface; prompt insertion lives here and nowhere else."""

from __future__ import annotations

from typing import Any

from vlprompt.backbones.base import Backbone
from vlprompt.backbones.vision import PixelPrompts, VisualPrompts
from vlprompt.core.registry import Registry

__all__ = [
    "BACKBONES",
    "Backbone",
    "PixelPrompts",
    "VisualPrompts",
    "create_backbone",
    "list_backbones",
    "missing_weights",
]

BACKBONES: Registry[Any] = Registry("backbone", "vlprompt.backbones")
"""Embedded and plug-in backbones; open_clip's architectures are looked up when none of these matches."""


def create_backbone(name: str, pretrained: str | None = None, **options: Any) -> Backbone:
    """Build a frozen dual encoder.

    Args:
        name: An embedded backbone (``"tiny"``) or any open_clip architecture (``"ViT-B-16"``, ``"RN50"``,
            ...).
        pretrained: For open_clip: a weights tag (``"openai"``), the path of a weights file (safetensors, or a
            torch state dict), or None for seeded random weights. For ``tiny``: None for its own weights,
            ``"random"``.
        **options: For open_clip: ``quick_gelu`` (None: what the weights were trained with), ``resize``
            (``"shortest"`` keeps proportions and crops, ``"squash"`` doesn't; None: as trained), ``tokenizer``,
            ``cache_dir``, ``seed`` of random weights.

    Raises:
        UnknownNameError: For an unknown name or tag, with the nearest valid ones.
        BackboneError: If weights can't be fetched or don't fit; says what to do and what works offline.
    """
    if name in BACKBONES:
        return BACKBONES.get(name).target(pretrained, **options)
    from vlprompt.backbones.openclip import build_open_clip

    return build_open_clip(name, pretrained, **options)


def list_backbones() -> list[str]:
    """Return the sorted names :func:`create_backbone` knows."""
    import open_clip

    return sorted({*BACKBONES.names(), *open_clip.list_models()})


def missing_weights(name: str, pretrained: str | None = None, cache_dir: str | None = None) -> str | None:
    """Return what must be fetched before a backbone can be built, as a sentence; None if nothing must.

    Args:
        name: See :func:`create_backbone`.
        pretrained: See there.
        cache_dir: Where downloaded weights are kept; None for the usual folders.
    """
    if name in BACKBONES or pretrained is None:
        return None
    from vlprompt.backbones.openclip import is_fetched

    if is_fetched(name, pretrained, cache_dir):
        return None
    return f"the weights {pretrained!r} of {name} are not on this machine; the first run fetches them."
