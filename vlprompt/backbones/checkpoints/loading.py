"""Models with weights from files: of an architecture that is named, or of the one that a card describes."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import open_clip
import torch
from open_clip.coca_model import CoCa
from open_clip.convert import load_big_vision_weights
from open_clip.model import CLIP, CustomTextCLIP
from torch import Tensor, nn

from vlprompt.backbones.checkpoints import WeightsError
from vlprompt.backbones.checkpoints.cards import Card, read_card
from vlprompt.backbones.checkpoints.facts import Facts, facts_of_file, facts_of_tag, resolve_facts
from vlprompt.backbones.checkpoints.files import WeightFiles
from vlprompt.backbones.checkpoints.fitting import load_tensors, open_clip_names
from vlprompt.backbones.checkpoints.tensors import Weights, read_weights, reason_of
from vlprompt.backbones.checkpoints.transformers_models import build_transformers_model, set_gelu
from vlprompt.core.errors import BackboneError

__all__ = ["Asked", "Loaded", "build_model", "hf_context_length", "load_architecture", "load_described"]

_DEFAULT_CONTEXT = 77  # open_clip's, of tokenizers whose architecture says nothing
_BIG_VISION = ".npz"  # Google's own format of SigLIP, which open_clip reads

# What makes an architecture: where a card says otherwise, it describes another one.
_STRUCTURE = {
    "vision_cfg": ("layers", "width", "head_width", "patch_size", "timm_model_name"),
    "text_cfg": ("layers", "width", "heads", "vocab_size", "hf_model_name"),
}


@dataclass(frozen=True)
class Asked:
    """What was asked for by name.

    Attributes:
        facts: Of the weights.
        weights_of: A tag that they are like.
        part: See :func:`vlprompt.backbones.checkpoints.tensors.read_weights`.
        leave_out: See :func:`vlprompt.backbones.checkpoints.fitting.load_tensors`.
    """

    facts: Facts
    weights_of: str | None = None
    part: str | None = None
    leave_out: Sequence[str] = ()


@dataclass(frozen=True)
class Loaded:
    """A model with its weights, and what belongs to them.

    Attributes:
        model: Of open_clip.
        preprocess: Fields of ``PreprocessCfg`` but the size.
        text: open_clip's ``text_cfg``, which says how texts are split; empty for a model of transformers.
        card: What lay beside the weights.
    """

    model: Any
    preprocess: Mapping[str, Any]
    text: Mapping[str, Any] = field(default_factory=dict)
    card: Card | None = None


def build_model(config: Mapping[str, Any]) -> nn.Module:
    """Return an open_clip model with random weights, from a ``model_cfg``."""
    arguments = copy.deepcopy(dict(config))
    text = arguments["text_cfg"]
    custom = arguments.pop("custom_text", False) or "hf_model_name" in text
    if "timm_model_name" in arguments["vision_cfg"]:
        arguments["vision_cfg"]["timm_model_pretrained"] = False
    if "hf_model_name" in text:
        text["hf_model_pretrained"] = False

    kind = CLIP if not custom else CoCa if "multimodal_cfg" in arguments else CustomTextCLIP
    model = kind(**arguments)
    hf_context_length(model, text)
    return model


def hf_context_length(model: Any, text: Mapping[str, Any]) -> None:
    """Give a model whose text tower is one of transformers the context length that open_clip's tokenizer has.

    The tower itself would take 514 or 1,024 tokens, of which nearly all would be padding.
    """
    if text.get("hf_model_name"):
        model.context_length = int(text.get("context_length", _DEFAULT_CONTEXT))


def load_architecture(name: str, files: WeightFiles, asked: Asked) -> Loaded:
    """Return an architecture of open_clip with weights from files.

    Args:
        name: One that open_clip knows.
        files: The weights.
        asked: What was asked for by name.

    Raises:
        BackboneError: If they can't be read, don't fit, or a fact of theirs is not known.
    """
    card = read_card(files.folder)
    config = open_clip.get_model_config(name)
    if card is not None and card.model:
        config = _card_config(name, config, card)

    if files.path.suffix == _BIG_VISION:
        facts = _facts(name, files, asked, None, card)
        model = build_model({**config, "quick_gelu": facts.quick_gelu})
        _load_big_vision(name, files, model)
        return Loaded(model, facts.preprocess, config["text_cfg"], card)

    try:
        weights = read_weights(files, asked.part)
        tensors = open_clip_names(weights.tensors)
    except WeightsError as problem:
        raise _unfit(name, files, problem) from problem

    facts = _facts(name, files, asked, weights, card)
    config = {
        **config,
        "quick_gelu": facts.quick_gelu,
        "text_cfg": _with_context(config["text_cfg"], tensors),
    }
    model = build_model(config)
    if card is not None and card.transformers:
        set_gelu(model, _hidden_act(card).startswith("gelu_"))

    _load(name, files, model, tensors, asked)
    return Loaded(model, facts.preprocess, config["text_cfg"], card)


def load_described(files: WeightFiles, asked: Asked, title: str) -> Loaded:
    """Return the model that the card beside weights describes, with these weights.

    Args:
        files: The weights.
        asked: What was asked for by name.
        title: What the user called it.

    Raises:
        BackboneError: If there is no card, or the weights can't be read or don't fit.
    """
    card = read_card(files.folder)
    if card is None or not (card.model or card.transformers):
        raise BackboneError(
            f"{title}: no open_clip_config.json, and no config.json of a CLIP or SigLIP, lies beside "
            f"{files.path.name}. Name the architecture: create_backbone('ViT-B-16', {str(files.path)!r})."
        )

    sources = _said_by_name(title, asked)
    if card.preprocess:
        sources.append(Facts(str(card.path), preprocess=card.preprocess))
    preprocess = _described_preprocess(title, sources)

    if card.model:
        quick_gelu = next((s.quick_gelu for s in sources if s.quick_gelu is not None), None)
        config = card.model if quick_gelu is None else {**card.model, "quick_gelu": quick_gelu}
        model = _described_model(config, card)
        text = config["text_cfg"]
    else:
        model = build_transformers_model(card.transformers, str(card.path))
        text = {}

    try:
        tensors = open_clip_names(read_weights(files, asked.part).tensors)
    except WeightsError as problem:
        raise _unfit(title, files, problem) from problem

    _load(title, files, model, tensors, asked)
    return Loaded(model, preprocess, text, card)


def _card_config(name: str, config: dict[str, Any], card: Card) -> dict[str, Any]:
    """Return the card's configuration, if it is one of this architecture."""
    for section, keys in _STRUCTURE.items():
        theirs = card.model.get(section) or {}
        for key in keys:
            if key in theirs and theirs[key] != config[section].get(key, theirs[key]):
                raise BackboneError(
                    f"{card.path} says {section}.{key} {theirs[key]!r}, {name} has {config[section][key]!r}: the card "
                    f"describes another architecture. What it describes is built by 'local-dir:{card.path.parent}'."
                )
    return copy.deepcopy(card.model)


def _described_model(config: Mapping[str, Any], card: Card) -> nn.Module:
    try:
        return build_model(config)
    except Exception as error:  # open_clip, timm and transformers each raise their own kinds
        raise BackboneError(
            f"{card.path} describes no model that can be built: {reason_of(error)}."
        ) from error


def _facts(name: str, files: WeightFiles, asked: Asked, weights: Weights | None, card: Card | None) -> Facts:
    """Collect what is known of weights, best first (see the module ``facts``)."""
    sources = [facts_of_tag(name, asked.weights_of)] if asked.weights_of is not None else []
    if card is not None:
        quick_gelu = None
        if card.model:
            quick_gelu = bool(card.model.get("quick_gelu", False))
        elif card.transformers:
            quick_gelu = _hidden_act(card) == "quick_gelu"
        sources.append(Facts(str(card.path), quick_gelu, card.preprocess))

    if weights is not None and weights.from_archive:
        openai = facts_of_tag("ViT-B-32", "openai")
        quick_gelu = True if weights.quick_gelu is None else weights.quick_gelu
        sources.append(Facts("OpenAI's archive", quick_gelu, openai.preprocess))

    published = facts_of_file(name, files.path)
    if published is not None:
        sources.append(published)
    return resolve_facts(name, files.path, asked.facts, sources)


def _hidden_act(card: Card) -> str:
    """Return the activation of a configuration of transformers; CLIP's and SigLIP's own where it doesn't say."""
    default = "quick_gelu" if card.transformers.get("model_type") == "clip" else "gelu_pytorch_tanh"
    return str((card.transformers.get("vision_config") or {}).get("hidden_act", default))


def _said_by_name(title: str, asked: Asked) -> list[Facts]:
    if asked.weights_of is None:
        return [asked.facts]
    if "/" not in asked.weights_of:
        raise BackboneError(
            f"{title} has no tags of its own: name the architecture with the tag, weights_of='ViT-B-16/openai'."
        )
    return [asked.facts, facts_of_tag("", asked.weights_of)]


def _described_preprocess(title: str, sources: list[Facts]) -> dict[str, Any]:
    preprocess: dict[str, Any] = {}
    for source in reversed(sources):
        preprocess |= {key: value for key, value in source.preprocess.items() if value is not None}

    missing = [key for key in ("mean", "std", "interpolation", "resize_mode") if key not in preprocess]
    if missing:
        raise BackboneError(
            f"{title} does not say how its images are prepared ({', '.join(missing)}): it has no "
            "preprocessor_config.json. Say what it was trained with: weights_of='ViT-B-16/openai' (as that is), or "
            "preprocess={'mean': [...], 'std': [...], 'interpolation': 'bicubic', 'resize_mode': 'shortest'}; in a "
            "configuration backbone.weights_of=ViT-B-16/openai, or backbone.preprocess.mean=[...] and so on."
        )
    return preprocess


def _with_context(text: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return ``text_cfg`` with as many positions as the weights have: the length of a text belongs to weights."""
    positions = tensors.get("positional_embedding", tensors.get("text.positional_embedding"))
    if positions is None or positions.dim() != 2 or text.get("hf_model_name"):
        return dict(text)
    return {**text, "context_length": len(positions) - (1 if text.get("embed_cls") else 0)}


def _load(
    title: str, files: WeightFiles, model: nn.Module, tensors: Mapping[str, Tensor], asked: Asked
) -> None:
    try:
        load_tensors(model, tensors, asked.leave_out)
    except WeightsError as problem:
        raise _unfit(title, files, problem) from problem
    except (RuntimeError, KeyError, ValueError, IndexError) as error:  # conversions of open_clip
        raise _unfit(title, files, WeightsError(reason_of(error))) from error


def _load_big_vision(name: str, files: WeightFiles, model: nn.Module) -> None:
    try:
        with torch.no_grad():
            load_big_vision_weights(model, str(files.path))
    except Exception as error:  # numpy and open_clip raise many kinds
        raise _unfit(name, files, WeightsError(reason_of(error))) from error


def _unfit(title: str, files: WeightFiles, problem: WeightsError) -> BackboneError:
    return BackboneError(
        f"{files.path} can't be loaded into {title}: {problem}. The file must be a safetensors file, a torch state "
        "dict (no pickled code) or a TorchScript archive, of this architecture."
    )
