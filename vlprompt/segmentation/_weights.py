"""Where a decoder's sizes and weights come from: the package, a CLIPSeg in transformers' layout, or nowhere."""

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

#: Where the package keeps decoders of the embedded backbone, as <model>_tiny.safetensors.
EMBEDDED = Path(str(files("vlprompt.segmentation"))) / "weights"

_LAYER = {
    "self_attn": "self_attn", "layer_norm1": "norm1", "layer_norm2": "norm2",
    "mlp.fc1": "linear1", "mlp.fc2": "linear2",
}  # fmt: skip


@dataclass(frozen=True)
class Decoder:
    """What is known of a decoder before it is built.

    Attributes:
        source: Where it comes from, for messages; empty for random weights.
        sizes: The model's options that its weights fix.
        state: Tensors by our names.
    """

    source: str = ""
    sizes: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Tensor] = field(default_factory=dict)


def embedded(model: str, backbone: Backbone) -> Decoder | None:
    """Return the package's decoder of a model for this very backbone, or None."""
    facts = backbone.fingerprint
    path = EMBEDDED / f"{model}_tiny.safetensors"
    if (facts.get("architecture"), facts.get("pretrained")) != ("tiny", "scenes") or not path.is_file():
        return None
    state, metadata = read_tensors(path)
    if metadata.get("backbone") != facts["weights"]:
        log.warning("%s was trained on other weights of tiny than these: the decoder is random.", path.name)
        return None
    return Decoder(path.name, metadata["sizes"], {n: t.float() for n, t in state.items()})


def clipseg_decoder(backbone: Backbone, weights: str | None) -> Decoder:
    """Return the CLIPSeg decoder that is asked for: None takes what belongs to the backbone, ``"random"`` nothing.

    Raises:
        BackboneError: If a checkpoint can't be had or read.
    """
    facts = backbone.fingerprint
    if weights is None and facts.get("architecture") == "clipseg":
        if facts.get("pretrained") is None:
            return Decoder(sizes=_clipseg_sizes(default_config()))
        weights = str(facts["pretrained"])
    if weights is None and (found := embedded("clipseg", backbone)):
        return found
    if weights in (None, "random"):
        return Decoder()
    config, state = read_checkpoint(str(weights))
    try:
        return Decoder(
            str(weights), _clipseg_sizes(config), _clipseg_state(state, len(config["extract_layers"]))
        )
    except KeyError as error:
        raise BackboneError(
            f"{weights} holds no CLIPSeg decoder in transformers' layout: {error} is missing."
        ) from error


def cris_decoder(backbone: Backbone, weights: str | None) -> Decoder:
    """Return the CRIS decoder that is asked for, as :func:`clipseg_decoder` does; ``weights`` may be a file.

    Raises:
        BackboneError: If a checkpoint can't be read.
    """
    facts = backbone.fingerprint
    if weights is None and facts.get("architecture") == "cris" and facts.get("pretrained") is not None:
        weights = str(facts["pretrained"])
    if weights is None and (found := embedded("cris", backbone)):
        return found
    if weights in (None, "random"):
        return Decoder()
    stored = read_cris(str(weights))
    connect = "backbone.visual.attnpool."
    state = {
        n.removeprefix(connect): t.float() for n, t in stored.items() if n.startswith(f"{connect}connect.")
    }
    state |= {n: t.float() for n, t in stored.items() if n.startswith(("neck.", "decoder.", "proj."))}
    layers = {n.split(".")[2] for n in state if n.startswith("decoder.layers.")}
    try:
        hidden, width = state["decoder.layers.0.ffn.0.weight"].shape
    except KeyError as error:
        raise BackboneError(f"{weights} holds no decoder in CRIS' layout: {error} is missing.") from error
    return Decoder(str(weights), {"width": width, "layers": len(layers), "hidden": hidden}, state)


def sizes(decoder: Decoder, given: Mapping[str, Any], otherwise: Mapping[str, Any]) -> dict[str, Any]:
    """Return a model's sizes: the weights' own, else what was given, else the default.

    Raises:
        ConfigError: If something else was given than the weights have.
    """
    clash = [
        f"{name}: got {given[name]!r}, but the decoder of {decoder.source} has {value!r}. Leave it out, or say "
        "weights='random'."
        for name, value in decoder.sizes.items()
        if decoder.source and given.get(name) is not None and given[name] != value
    ]
    if clash:
        raise ConfigError(clash, "decoder")
    asked = {name: value for name, value in given.items() if value is not None}
    return {**otherwise, **decoder.sizes, **asked}


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
    out: dict[str, Tensor] = {}
    for name in ("film_mul", "film_add", *(f"reduces.{i}" for i in range(taps))):
        out |= {f"{name}.{kind}": state[f"decoder.{name}.{kind}"] for kind in ("weight", "bias")}
    for i in range(taps):
        layer = layer_state(state, f"decoder.layers.{i}.", _LAYER)
        out |= {f"layers.{i}.{name}": tensor for name, tensor in layer.items()}
    head = "decoder.transposed_convolution"
    return out | {n.replace(head, "upsample"): t for n, t in state.items() if n.startswith(head)}
