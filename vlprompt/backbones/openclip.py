"""Building backbones from open_clip: any architecture, any tag, local weights, or random ones."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

import open_clip
import torch
from huggingface_hub import try_to_load_from_cache
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import nn

from vlprompt.backbones.base import Backbone, content_id
from vlprompt.backbones.tokenizer import TextTokenizer, wrap_tokenizer
from vlprompt.core.errors import BackboneError, UnknownNameError

__all__ = ["build_open_clip", "is_fetched", "wrap_open_clip"]

log = logging.getLogger("vlprompt.backbones")

_OFFLINE = "What works offline: create_backbone('tiny'), whose weights are in the package, or pretrained=None (random)."


def build_open_clip(
    name: str,
    pretrained: str | None,
    *,
    quick_gelu: bool | None = None,
    resize: Literal["shortest", "squash"] | None = None,
    tokenizer: Any = None,
    cache_dir: str | None = None,
    seed: int = 0,
) -> Backbone:
    """Build an open_clip architecture; see :func:`vlprompt.backbones.create_backbone`.

    Raises:
        UnknownNameError: If the architecture or the weights tag doesn't exist.
        BackboneError: If weights can't be fetched or don't fit.
    """
    if name not in open_clip.list_models():
        raise UnknownNameError("backbone", name, [*open_clip.list_models(), "tiny"])

    arguments = _weights_arguments(name, pretrained, quick_gelu)
    if quick_gelu is not None:
        arguments["quick_gelu"] = quick_gelu

    try:
        with _quiet(), torch.random.fork_rng():
            torch.manual_seed(seed)
            model = open_clip.create_model(name, cache_dir=cache_dir, **arguments)
    except Exception as error:  # open_clip, the hub client and torch each raise their own kinds
        raise _explain(name, pretrained, error) from error

    missing = ""
    if tokenizer is None:
        tokenizer, missing = _tokenizer(name, cache_dir)

    preprocess = dict(getattr(model.visual, "preprocess_cfg", {}))
    if resize is not None:
        preprocess["resize_mode"] = resize

    facts = {"architecture": name, "pretrained": pretrained if pretrained is None else str(pretrained)}
    return wrap_open_clip(model, preprocess, wrap_tokenizer(tokenizer) if tokenizer else None, facts, missing)


def wrap_open_clip(
    model: nn.Module,
    preprocess: dict[str, Any],
    tokenizer: TextTokenizer | None,
    facts: dict[str, Any],
    missing_tokenizer: str = "",
) -> Backbone:
    """Make a :class:`Backbone` of an open_clip model.

    Args:
        model: The model with its weights.
        preprocess: Fields of open_clip's ``PreprocessCfg``.
        tokenizer: The text tower's tokenizer.
        facts: ``architecture`` and ``pretrained`` for the fingerprint.
        missing_tokenizer: Why there is no tokenizer.
    """
    config = PreprocessCfg(**preprocess)
    text: Any = getattr(model, "text", model)
    projection = getattr(text, "text_projection", None)
    activations = {type(m).__name__ for m in model.modules() if type(m).__name__ in ("QuickGELU", "GELU")}
    fingerprint = {
        **facts,
        "weights": _hash_weights(model),
        "activation": "+".join(sorted(activations)).lower() or "none",
        "preprocess": {
            "size": list(config.size) if isinstance(config.size, (tuple, list)) else config.size,
            "mean": list(config.mean),
            "std": list(config.std),
            "interpolation": config.interpolation,
            "resize_mode": config.resize_mode,
        },
        "dim": _joint_dim(model, projection),
    }
    fingerprint["id"] = content_id(fingerprint)

    return Backbone(
        model, image_transform_v2(config, is_train=False), tokenizer, fingerprint, missing_tokenizer
    )


def _joint_dim(model: Any, projection: Any) -> int:
    if isinstance(projection, nn.Linear):
        return projection.out_features
    if projection is not None:
        return int(projection.shape[1])

    output = getattr(model.visual, "output_dim", None)
    if output is not None:
        return int(output)

    with torch.no_grad():
        size = model.visual.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return int(model.visual(torch.zeros(1, 3, height, width)).shape[-1])


def _weights_arguments(name: str, pretrained: str | None, quick_gelu: bool | None = None) -> dict[str, Any]:
    """Return create_model's arguments for a tag, a path or no weights, with the weights' own activation."""
    if pretrained is None:
        return {"pretrained": None, "pretrained_text": False}

    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained not in tags and Path(pretrained).is_file():
        if quick_gelu is None:
            built = "QuickGELU" if (open_clip.get_model_config(name) or {}).get("quick_gelu") else "GELU"
            log.warning(
                "%s: a file does not say which activation its weights were trained with; using %s's own, %s. "
                "OpenAI's CLIP weights need quick_gelu=true.",
                *(pretrained, name, built),
            )
        return {"pretrained": str(pretrained), "weights_only": True}

    if pretrained not in tags:
        if Path(pretrained).suffix in (".safetensors", ".pt", ".pth", ".bin"):
            raise BackboneError(f"no weights file at {pretrained} (asked for by {name}).")
        hint = "Or give the path of a local weights file (safetensors, or a torch state dict)."
        raise UnknownNameError(f"weights tag of {name}", pretrained, tags, hint)

    trained_with_quick = bool((open_clip.get_pretrained_cfg(name, pretrained) or {}).get("quick_gelu", False))
    built_with_quick = bool((open_clip.get_model_config(name) or {}).get("quick_gelu", False))
    arguments: dict[str, Any] = {"pretrained": pretrained}

    if trained_with_quick != built_with_quick:
        log.info(
            "%s/%s was trained with %s: using it.",
            name,
            pretrained,
            "QuickGELU" if trained_with_quick else "GELU",
        )
        arguments["quick_gelu"] = trained_with_quick

    return arguments


def _tokenizer(name: str, cache_dir: str | None) -> tuple[Any, str]:
    try:
        with _quiet():
            return open_clip.get_tokenizer(name, cache_dir=cache_dir), ""
    except Exception as error:  # a missing package, an unreachable hub: both mean there is no tokenizer here
        return None, (
            f"the tokenizer of {name} could not be loaded ({_first_line(error)}). It is fetched from the Hugging Face "
            "Hub and needs the 'transformers' package: install it and go online once, or pass tokenizer=... . "
            f"Images can be encoded without it. {_OFFLINE}"
        )


def _explain(name: str, pretrained: str | None, error: Exception) -> BackboneError:
    reason = _first_line(error)
    if pretrained is not None and Path(pretrained).is_file():
        return BackboneError(
            f"{pretrained} can't be loaded into {name}: {reason}. The file must be a safetensors file or a torch state "
            "dict (no pickled code) of this architecture."
        )
    if pretrained is None:
        return BackboneError(f"{name} can't be built: {reason}. {_OFFLINE}")

    entry = open_clip.get_pretrained_cfg(name, pretrained) or {}
    source = entry.get("hf_hub") or entry.get("url") or "the Hugging Face Hub"
    return BackboneError(
        f"the weights of {name}/{pretrained} could not be fetched: {reason}. "
        f"They come from {source}. Fetch them where there is a network and pass pretrained=PATH, or set HF_HOME to a "
        f"cache that holds them. {_OFFLINE}"
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    if "weights_only" in str(error):  # torch's own text advises to run the pickled code
        return "it holds more than plain tensors"
    return shorten(text[0] if text else type(error).__name__, 300, placeholder=" ...").rstrip(".")


def _hash_weights(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:12]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep open_clip's root-logger chatter out of a user's terminal; what matters is said by our own errors."""
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        logging.disable(previous)


def is_fetched(name: str, pretrained: str, cache_dir: str | None = None) -> bool:
    """Return whether weights are on this machine: a path, or a tag whose file lies in its cache."""
    if Path(pretrained).exists():
        return True

    entry = open_clip.get_pretrained_cfg(name, pretrained)
    hub_name = entry.get("hf_hub", "").rstrip("/")
    if hub_name:
        files = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
        return any(isinstance(try_to_load_from_cache(hub_name, file, cache_dir), str) for file in files)

    folder = Path(cache_dir or "~/.cache/clip").expanduser()
    return bool(entry.get("url")) and (folder / Path(entry["url"]).name).is_file()
