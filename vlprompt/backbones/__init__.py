"""CLIP-family towers behind one interface; prompt insertion lives here and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from vlprompt.backbones.base import Backbone
from vlprompt.backbones.origin import origin_of
from vlprompt.backbones.vision import PixelPrompts, VisualPrompts
from vlprompt.core.devices import check_device
from vlprompt.core.errors import UnknownNameError
from vlprompt.core.options import check_options
from vlprompt.core.precision import Device, Precision
from vlprompt.core.preprocessing import read_preprocess_options
from vlprompt.core.registry import Registry

__all__ = [
    "BACKBONES",
    "Backbone",
    "PixelPrompts",
    "VisualPrompts",
    "create_backbone",
    "list_backbones",
    "missing_weights",
    "unknown_backbone",
]

BACKBONES: Registry[Any] = Registry("backbone", "vlprompt.backbones")
"""Embedded and plug-in backbones; open_clip's architectures are looked up when none of these matches."""


def create_backbone(
    name: str | nn.Module,
    pretrained: str | None = None,
    *,
    precision: Precision | None = None,
    device: Device | None = None,
    **options: Any,
) -> Backbone:
    """Build a frozen dual encoder.

    Args:
        name: An embedded backbone (``"tiny"``); any open_clip architecture (``"ViT-B-16"``, ``"RN50"``, ...);
            ``"hf-hub:org/name"`` or ``"local-dir:PATH"``, which bring a card and their weights (of open_clip, or a CLIP
            or SigLIP of transformers); or a built model of open_clip or transformers, which is frozen in place.
        pretrained: For open_clip: a weights tag (``"openai"``), the path of weights, or None for seeded random
            weights. Weights are a safetensors file, a torch state dict or checkpoint, a TorchScript archive, an index
            of parts, or a folder with one of them, in the layout of open_clip or transformers. For ``tiny``: None for
            its own weights, ``"random"``.
        precision: What the frozen towers are stored and run in: ``"fp32"``, ``"bf16"`` (half the memory, and about
            twice as fast where the processor or card has units for it) or ``"fp16"`` (for cards without bf16). What is
            learned, normalised features, logits and losses are float32 in any of them. None: fp32, on every device, so
            that the same call gives the same numbers everywhere; a built model keeps what it has.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"`` or ``"mps"``. None: the processor until it is trained, which
            takes it to a GPU if there is one; a built model stays where it is.
        **options: For all that are named: ``resize`` (``"shortest"`` keeps proportions and crops, ``"longest"`` pads,
            ``"squash"`` doesn't keep them; None: as trained) and ``preprocess`` (``mean``, ``std``, ``interpolation``,
            ``resize_mode``; what is left out: as trained).
            For open_clip: ``quick_gelu`` (None: what the weights were trained with), ``weights_of`` (a tag that weights
            from a file are like), ``part`` (which model of a file that holds several), ``leave_out`` (beginnings of
            names of tensors that are not wanted, such as a head), ``logit_scale`` and ``logit_bias`` (None: the
            weights' own), ``tokenizer``, ``cache_dir``, ``seed`` of random weights.
            For built models: see :func:`vlprompt.backbones.built.build_from_model`.

    Raises:
        UnknownNameError: For an unknown name or tag, with the nearest valid ones.
        BackboneError: If weights can't be fetched or don't fit, or nothing says how they were trained; says what to do
            and what works offline. If the device isn't there or can't compute in the precision; says what is there.
        ConfigError: For options that the backbone doesn't have, or values it doesn't take.
    """
    title = name if isinstance(name, str) else type(name).__name__
    _checked(_place, {"precision": precision, "device": device}, title)
    place = None if device is None else check_device(device, precision or "fp32")  # before weights are read

    backbone = _build(name, pretrained, options)
    if precision is not None and precision != backbone.precision:
        backbone.set_precision(precision)
    backbone.asked_device = place
    return backbone if place is None else backbone.to(place)


def _place(*, precision: Precision | None = None, device: Device | None = None) -> None:
    """Stand for the two options of every backbone where options are checked."""


def _build(name: str | nn.Module, pretrained: str | None, options: Mapping[str, Any]) -> Backbone:
    """Build a backbone on the processor, in the precision of its weights' file or fp32."""
    if not isinstance(name, str):
        from vlprompt.backbones.built import build_from_model

        return build_from_model(name, **_checked(build_from_model, options, type(name).__name__))

    if name in BACKBONES:
        backbone = _registered(name, pretrained, options)
    else:
        from vlprompt.backbones.openclip import build_open_clip

        checked = _checked(build_open_clip, options, name)
        backbone = build_open_clip(name, None if pretrained is None else str(pretrained), **checked)

    backbone.origin = origin_of(name, pretrained, options)
    return backbone


def _registered(name: str, pretrained: str | None, options: Mapping[str, Any]) -> Backbone:
    """Build an embedded or plug-in backbone; its images can be prepared in another way like all others'."""
    from vlprompt.backbones.preprocessing import change_preprocessing

    builder = BACKBONES.get(name).target
    shared = {key: options[key] for key in ("preprocess", "resize") if key in options}
    changes = read_preprocess_options(shared.get("preprocess"), shared.get("resize"), f"backbone {name!r}")
    others = {key: value for key, value in options.items() if key not in shared}

    backbone = builder(pretrained, **_checked(builder, others, name))
    change_preprocessing(backbone, changes)
    return backbone


def _checked(builder: Any, options: Mapping[str, Any], name: str) -> dict[str, Any]:
    return check_options(builder, options, source=f"backbone {name!r}")


def list_backbones() -> list[str]:
    """Return the sorted names :func:`create_backbone` knows."""
    import open_clip

    return sorted({*BACKBONES.names(), *open_clip.list_models()})


def unknown_backbone(name: str) -> UnknownNameError | None:
    """Return what :func:`create_backbone` would say of a name that it doesn't know; None if it knows it.

    Args:
        name: A name from :func:`list_backbones`, ``hf-hub:org/name`` or ``local-dir:PATH``.
    """
    names = list_backbones()
    known = name in names or name.startswith(("hf-hub:", "local-dir:"))
    return None if known else UnknownNameError("backbone", name, names)


def missing_weights(name: str, pretrained: str | None = None, cache_dir: str | None = None) -> str | None:
    """Return what must be fetched or is missing before a backbone can be built, as a sentence; None if nothing is.

    Args:
        name: See :func:`create_backbone`.
        pretrained: See there.
        cache_dir: Where downloaded weights are kept; None for the usual folders.
    """
    if name in BACKBONES:
        return None
    from vlprompt.backbones.openclip import missing_files

    return missing_files(name, pretrained, cache_dir)
