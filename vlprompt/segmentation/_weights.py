"""Sizes and weights of decoders: from the package, from a checkpoint in a published layout, or random."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vlprompt.backbones import Backbone
from vlprompt.backbones.clipseg import default_config, layer_state, read_checkpoint
from vlprompt.backbones.cris import read_cris
from vlprompt.core.errors import BackboneError, ConfigError
from vlprompt.core.files import read_tensors

__all__ = ["EMBEDDED", "Decoder", "clipseg_decoder", "cris_decoder", "embedded", "fill", "sizes"]

log = logging.getLogger("vlprompt.segmentation")

#: Folder of the decoders of embedded backbones, as <model>_<backbone>.safetensors.
EMBEDDED = Path(str(files("vlprompt.segmentation"))) / "weights"
#: Architecture and tag of the backbones that have some, and what files call them.
_BACKBONES = {("tiny", "scenes"): "tiny", ("photo-vit", "imagenet"): "photo_vit"}

_LAYER = {
    "self_attn": "self_attn", "layer_norm1": "norm1", "layer_norm2": "norm2",
    "mlp.fc1": "linear1", "mlp.fc2": "linear2",
}  # fmt: skip


@dataclass(frozen=True)
class Decoder:
    """A decoder's sizes and weights, before it is built.

    Attributes:
        source: Where it comes from, for messages; empty for random weights.
        sizes: The model's options that its weights fix.
        state: Tensors by our names.
        words: Phrases it was trained on, where the file says so.
    """

    source: str = ""
    sizes: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)
    words: tuple[str, ...] = ()


def embedded(model: str, backbone: Backbone) -> Decoder | None:
    """Return the package's decoder of a model for this very backbone, or None."""
    facts = backbone.fingerprint
    name = _BACKBONES.get((str(facts.get("architecture")), str(facts.get("pretrained"))))
    path = EMBEDDED / f"{model}_{name}.safetensors"
    if name is None or not path.is_file():
        return None

    state, metadata = read_tensors(path)
    if metadata.get("backbone") != facts["weights"]:
        log.warning(
            "%s was trained on other weights of %s than these: the decoder is random.", path.name, name
        )
        return None

    weights = {name: tensor.float() for name, tensor in state.items()}
    return Decoder(path.name, metadata["sizes"], weights, tuple(metadata.get("words", ())))


def clipseg_decoder(backbone: Backbone, weights: str | None) -> Decoder:
    """Return the weights of a CLIPSeg decoder.

    Args:
        backbone: What the decoder will read.
        weights: None takes those that belong to the backbone, if there are any; ``"random"`` takes none; otherwise a
            folder or Hugging Face name in transformers' layout.

    Raises:
        BackboneError: If a checkpoint can't be had or read.
    """
    facts = backbone.fingerprint
    if weights is None and facts.get("architecture") == "clipseg":
        if facts.get("pretrained") is None:
            return Decoder(sizes=_clipseg_sizes(default_config()))
        weights = str(facts["pretrained"])

    if weights is None:
        return embedded("clipseg", backbone) or Decoder()
    if weights == "random":
        return Decoder()

    config, checkpoint = read_checkpoint(weights)
    try:
        state = _clipseg_state(checkpoint, len(config["extract_layers"]))
        return Decoder(weights, _clipseg_sizes(config), state)
    except KeyError as error:
        raise BackboneError(
            f"{weights} holds no CLIPSeg decoder in transformers' layout: {error} is missing."
        ) from error


def cris_decoder(backbone: Backbone, weights: str | None) -> Decoder:
    """Return the weights of a CRIS decoder.

    Args:
        backbone: What the decoder will read.
        weights: None takes those that belong to the backbone, if there are any; ``"random"`` takes none; otherwise the
            path of a checkpoint in the published layout.

    Raises:
        BackboneError: If a checkpoint can't be read.
    """
    facts = backbone.fingerprint
    if weights is None and facts.get("architecture") == "cris" and facts.get("pretrained") is not None:
        weights = str(facts["pretrained"])
    if weights is None:
        return embedded("cris", backbone) or Decoder()
    if weights == "random":
        return Decoder()

    # The connection beside the attention pool is the decoder's here; in checkpoints it lies in the image tower.
    pool = "backbone.visual.attnpool."
    state = {}

    for name, tensor in read_cris(weights).items():
        if name.startswith((f"{pool}connect.", "neck.", "decoder.", "proj.")):
            state[name.removeprefix(pool)] = tensor.float()

    layers = {name.split(".")[2] for name in state if name.startswith("decoder.layers.")}

    try:
        hidden, width = state["decoder.layers.0.ffn.0.weight"].shape
    except KeyError as error:
        raise BackboneError(f"{weights} holds no decoder in CRIS' layout: {error} is missing.") from error

    return Decoder(weights, {"width": width, "layers": len(layers), "hidden": hidden}, state)


def sizes(decoder: Decoder, options: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's sizes: those of the weights, else the options, else the defaults.

    Args:
        decoder: The weights.
        options: What the user asks for; None leaves a size open.
        defaults: What is taken where neither says anything.

    Raises:
        ConfigError: If an option asks for another size than the weights have.
    """
    chosen = {name: value for name, value in options.items() if value is not None}
    problems = []

    if decoder.source:
        for name, value in decoder.sizes.items():
            if name in chosen and chosen[name] != value:
                problems.append(
                    f"{name}: got {chosen[name]!r}, but the decoder of {decoder.source} has {value!r}. "
                    "Leave it out, or say weights='random'."
                )

    if problems:
        raise ConfigError(problems, "decoder")
    return {**defaults, **decoder.sizes, **chosen}


def fill(module: nn.Module, decoder: Decoder, model: str) -> None:
    """Put a decoder's weights into its module, strictly.

    Raises:
        BackboneError: If they don't fit the backbone's widths.
    """
    if not decoder.source:
        log.warning("%s has no pretrained decoder for this backbone: its decoder is random.", model)
        return

    try:
        module.load_state_dict(decoder.state)
    except RuntimeError as error:
        raise BackboneError(f"the decoder of {decoder.source} does not fit this backbone: {error}") from error


def _clipseg_sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "taps": tuple(config["extract_layers"]),
        "reduce": config["reduce_dim"],
        "heads": config["decoder_num_attention_heads"],
        "hidden": config["decoder_intermediate_size"],
        "refined": bool(config["use_complex_transposed_convolution"]),
        "conditional": config["conditional_layer"],
    }


def _clipseg_state(state: Mapping[str, Tensor], taps: int) -> dict[str, Tensor]:
    """Return a decoder's tensors by :class:`FilmDecoder`'s names."""
    renamed: dict[str, Tensor] = {}
    for name in ("film_mul", "film_add", *(f"reduces.{i}" for i in range(taps))):
        for kind in ("weight", "bias"):
            renamed[f"{name}.{kind}"] = state[f"decoder.{name}.{kind}"]

    for i in range(taps):
        layer = layer_state(state, f"decoder.layers.{i}.", _LAYER)
        renamed |= {f"layers.{i}.{name}": tensor for name, tensor in layer.items()}

    head = "decoder.transposed_convolution"
    for name, tensor in state.items():
        if name.startswith(head):
            renamed[name.replace(head, "upsample")] = tensor
    return renamed
