"""Backbones of models that were built elsewhere, by open_clip or by transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import open_clip
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.tokenizer import SimpleTokenizer
from torch import nn

from vlprompt.backbones.base import Backbone
from vlprompt.backbones.checkpoints import WeightsError
from vlprompt.backbones.checkpoints.cards import PREPROCESS_FIELDS, transformers_preprocessing
from vlprompt.backbones.checkpoints.facts import facts_of_tag
from vlprompt.backbones.checkpoints.fitting import load_tensors, open_clip_names
from vlprompt.backbones.checkpoints.transformers_models import build_transformers_model
from vlprompt.backbones.openclip import wrap_open_clip
from vlprompt.backbones.origin import BUILT, UNSAVED
from vlprompt.backbones.tokenizer import wrap_tokenizer
from vlprompt.core.errors import BackboneError, UnknownNameError
from vlprompt.core.preprocessing import ResizeMode, read_preprocess_options

__all__ = ["build_from_model"]

_BYTE_PAIRS = 49408  # size of CLIP's own vocabulary


def build_from_model(
    model: nn.Module,
    *,
    architecture: str | None = None,
    preprocess: Any = None,
    resize: ResizeMode | None = None,
    weights_of: str | None = None,
    tokenizer: Any = None,
) -> Backbone:
    """Make a backbone of a model that is there already.

    Args:
        model: A CLIP of open_clip, which is frozen in place; or a ``CLIPModel`` or ``SiglipModel`` of transformers,
            whose weights are copied into a model of open_clip.
        architecture: open_clip's name of it, under which prompts find it again; None: the name of its class.
        preprocess: Fields of :class:`vlprompt.core.preprocessing.PreprocessOptions`, or an image processor (or a
            whole processor) of transformers. None: what open_clip wrote on the model when it built it.
        resize: See :func:`vlprompt.create_backbone`.
        weights_of: A tag whose preprocessing it has, ``"ARCHITECTURE/tag"``.
        tokenizer: Of open_clip or transformers. None: that of a processor, of ``architecture``, or CLIP's own if the
            vocabulary has its size.

    Raises:
        BackboneError: If it is no such model, or nothing says how its images are prepared.
        UnknownNameError: If there is no such architecture or tag.
    """
    if architecture is not None and architecture not in open_clip.list_models():
        raise UnknownNameError("architecture", architecture, open_clip.list_models())

    title = type(model).__name__
    if tokenizer is None:
        tokenizer = getattr(preprocess, "tokenizer", None)  # of a whole processor of transformers
    facts = _preprocessing(title, model, architecture, preprocess, resize, weights_of)

    if not isinstance(model, (CLIP, CustomTextCLIP, CoCa)):
        model = _of_transformers(model)

    missing = ""
    if tokenizer is None:
        tokenizer, missing = _tokenizer(model, architecture)
    backbone = wrap_open_clip(
        model,
        {**facts, "size": _visual(model).image_size},
        wrap_tokenizer(tokenizer) if tokenizer is not None else None,
        {"architecture": architecture or title, "pretrained": None},
        missing,
    )
    backbone.origin = {UNSAVED: [BUILT]}
    return backbone


def _of_transformers(model: Any) -> nn.Module:
    """Return a model of open_clip that computes what a model of transformers does."""
    title = type(model).__name__
    to_dict = getattr(getattr(model, "config", None), "to_dict", None)
    if to_dict is None:
        raise BackboneError(
            f"a {title} is no model of open_clip or transformers. Those that can be used: CLIP, CustomTextCLIP, CoCa "
            "(open_clip), CLIPModel, SiglipModel (transformers)."
        )

    converted = build_transformers_model(to_dict(), title)
    try:
        load_tensors(converted, open_clip_names(model.state_dict()))
    except WeightsError as problem:
        raise BackboneError(f"{title} can't be used: {problem}.") from problem
    return converted.to(next(model.parameters()).device)


def _preprocessing(
    title: str,
    model: nn.Module,
    architecture: str | None,
    preprocess: Any,
    resize: str | None,
    weights_of: str | None,
) -> dict[str, Any]:
    """Collect how images are prepared: what is on the model, what a tag says, what was asked for."""
    facts = dict(getattr(_visual(model), "preprocess_cfg", None) or {})
    if weights_of is not None:
        if architecture is None and "/" not in weights_of:
            raise BackboneError(
                f"weights_of={weights_of!r}: name the architecture with the tag, weights_of='ViT-B-16/openai'."
            )
        facts |= facts_of_tag(architecture or "", weights_of).preprocess

    if preprocess is None or isinstance(preprocess, Mapping):
        facts |= read_preprocess_options(preprocess, resize, title)
    else:
        facts |= _of_processor(preprocess) | read_preprocess_options(None, resize, title)

    missing = [key for key in PREPROCESS_FIELDS if key not in facts]
    if missing:
        raise BackboneError(
            f"the {title} does not say how its images are prepared ({', '.join(missing)}). Give its image processor "
            "(preprocess=CLIPImageProcessor.from_pretrained(...)), a tag that it is like "
            "(weights_of='ViT-B-16/openai'), or the facts themselves: preprocess={'mean': [...], 'std': [...], "
            "'interpolation': 'bicubic', 'resize_mode': 'shortest'}."
        )
    return facts


def _of_processor(processor: Any) -> dict[str, Any]:
    processor = getattr(processor, "image_processor", processor)
    to_dict = getattr(processor, "to_dict", None)
    if to_dict is None:
        raise BackboneError(
            f"preprocess: a {type(processor).__name__} does not say what it does. Give the facts by name "
            "(preprocess={'mean': [...], ...}), or an image processor of transformers."
        )
    return transformers_preprocessing(to_dict(), type(processor).__name__)


def _tokenizer(model: Any, architecture: str | None) -> tuple[Any, str]:
    missing = (
        "the model was given without its tokenizer. Give it, too: create_backbone(model, "
        "tokenizer=open_clip.get_tokenizer(NAME)), or the tokenizer of transformers. Images can be encoded without it."
    )
    if architecture is not None:
        try:
            return open_clip.get_tokenizer(architecture), ""
        except Exception:  # a missing package, an unreachable hub: both mean there is no tokenizer here
            return None, missing

    text = getattr(model, "text", model)
    if getattr(text, "vocab_size", None) == _BYTE_PAIRS:
        return SimpleTokenizer(context_length=model.context_length), ""
    return None, missing


def _visual(model: Any) -> Any:
    return getattr(model, "visual", None)
