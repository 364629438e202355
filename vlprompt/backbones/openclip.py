"""Building backbones from open_clip: random weights, or those of a tag, a file, a folder, the Hub."""

from __future__ import annotations

import contextlib
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import open_clip
import torch
from huggingface_hub import try_to_load_from_cache
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from open_clip.transform import PreprocessCfg
from pydantic import Field
from torch import nn

from vlprompt.backbones.base import Backbone, content_id
from vlprompt.backbones.checkpoints.facts import Facts, hub_files
from vlprompt.backbones.checkpoints.files import WEIGHT_FILES, WeightFiles, find_weight_files
from vlprompt.backbones.checkpoints.hub import WeightsRepository, fetch_weights
from vlprompt.backbones.checkpoints.loading import (
    Asked,
    Loaded,
    hf_context_length,
    load_architecture,
    load_described,
)
from vlprompt.backbones.checkpoints.tensors import reason_of
from vlprompt.backbones.preprocessing import preprocessing_facts, transform_of
from vlprompt.backbones.tokenizer import TextTokenizer, wrap_tokenizer
from vlprompt.core.errors import BackboneError, ConfigError, UnknownNameError
from vlprompt.core.hub import HF_HUB
from vlprompt.core.paths import looks_like_path, user_path
from vlprompt.core.preprocessing import ResizeMode, read_preprocess_options
from vlprompt.core.weights import weights_id

__all__ = ["build_open_clip", "missing_files", "wrap_open_clip"]

log = logging.getLogger("vlprompt.backbones")

LOCAL = "local-dir:"

_RANDOM = "Its weights are random, so it knows neither images nor words. Name weights: pretrained=..., a tag or a file."
_OFFLINE = "What works offline: create_backbone('tiny'), whose weights are in the package, or pretrained=None (random)."
_BYTE_PAIRS = 49408  # size of CLIP's own vocabulary
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "spiece.model")


def build_open_clip(
    name: str,
    pretrained: str | None,
    *,
    quick_gelu: bool | None = None,
    weights_of: str | None = None,
    preprocess: Mapping[str, Any] | None = None,
    resize: ResizeMode | None = None,
    logit_scale: Annotated[float, Field(gt=0)] | None = None,
    logit_bias: float | None = None,
    part: str | None = None,
    leave_out: Sequence[str] = (),
    tokenizer: Any = None,
    cache_dir: str | None = None,
    seed: int = 0,
) -> Backbone:
    """Build an open_clip architecture; see :func:`vlprompt.backbones.create_backbone`.

    Raises:
        UnknownNameError: If the architecture or the weights tag doesn't exist.
        BackboneError: If weights can't be fetched or don't fit, or nothing says how they were trained.
        ConfigError: If an option has a bad value, or has no meaning here.
    """
    wanted = read_preprocess_options(preprocess, resize, f"backbone {name!r}")
    cache_dir = None if cache_dir is None else str(user_path(cache_dir))
    asked = Asked(Facts("asked for", quick_gelu, wanted), weights_of, part, leave_out)

    if name.startswith((HF_HUB, LOCAL)):
        loaded, source = _described(name, pretrained, asked, cache_dir)
        # A place is no part of what a model is: the same folder, moved, is the same backbone.
        architecture = loaded.card.transformers.get("model_type", "open_clip") if loaded.card else "open_clip"
        facts = {"architecture": architecture, "pretrained": name}
    else:
        if name not in open_clip.list_models():
            raise UnknownNameError("backbone", name, [*open_clip.list_models(), "tiny"])
        loaded, source = _architecture(name, pretrained, asked, cache_dir, seed)
        facts = {"architecture": name, "pretrained": None if pretrained is None else str(pretrained)}

    _set_scale(loaded.model, logit_scale, logit_bias)
    missing = ""
    if tokenizer is None:
        tokenizer, missing = _tokenizer(name, loaded, source, cache_dir)
    elif isinstance(tokenizer, str):
        tokenizer = _named_tokenizer(tokenizer, loaded, cache_dir)

    fields = {**loaded.preprocess, **wanted, "size": loaded.model.visual.image_size}
    backbone = wrap_open_clip(
        loaded.model, fields, wrap_tokenizer(tokenizer) if tokenizer else None, facts, missing
    )
    if facts["pretrained"] is None:
        backbone.about = _RANDOM
        log.warning("%s: %s", name, _RANDOM)
    return backbone


def wrap_open_clip(
    model: nn.Module,
    preprocess: dict[str, Any],
    tokenizer: TextTokenizer | None,
    facts: dict[str, Any],
    missing_tokenizer: str = "",
    weights: str | None = None,
) -> Backbone:
    """Make a :class:`Backbone` of an open_clip model.

    Args:
        model: The model with its weights.
        preprocess: Fields of open_clip's ``PreprocessCfg``.
        tokenizer: The text tower's tokenizer.
        facts: ``architecture`` and ``pretrained`` for the fingerprint.
        missing_tokenizer: Why there is no tokenizer.
        weights: The hash of its weights as they were loaded, where they have been rounded since.
    """
    config = PreprocessCfg(**preprocess)
    text: Any = getattr(model, "text", model)
    projection = getattr(text, "text_projection", None)
    fingerprint = {
        **facts,
        "weights": weights or weights_id(model.state_dict()),
        "activation": "+".join(_activations(model)) or "none",
        "preprocess": preprocessing_facts(config),
        "dim": _joint_dim(model, projection),
    }
    fingerprint["id"] = content_id(fingerprint)
    return Backbone(model, transform_of(config), tokenizer, fingerprint, missing_tokenizer)


def _activations(model: nn.Module) -> list[str]:
    """Return the names of a model's kinds of GELU."""
    names = set()
    for module in model.modules():
        name = type(module).__name__
        if name == "QuickGELU":
            names.add("quickgelu")
        elif name == "GELUTanh" or (isinstance(module, nn.GELU) and module.approximate == "tanh"):
            names.add("gelutanh")
        elif name == "GELU":
            names.add("gelu")
    return sorted(names)


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


def _described(
    name: str, pretrained: str | None, asked: Asked, cache_dir: str | None
) -> tuple[Loaded, str | Path]:
    """Return what ``hf-hub:org/name`` or ``local-dir:PATH`` describes, and where its tokenizer lies."""
    if pretrained is not None:
        raise ConfigError(
            [f"pretrained: {name} brings its own weights; leave {pretrained!r} out."], "backbone"
        )

    if name.startswith(HF_HUB):
        repository = WeightsRepository(name.removeprefix(HF_HUB), cache_dir)
        files = fetch_weights(repository, card=True)
        source: str | Path = repository.repo
    else:
        folder = user_path(name.removeprefix(LOCAL))
        if not folder.is_dir():
            raise BackboneError(f"{name}: no such folder: {folder}.")
        files = find_weight_files(folder, name)
        source = folder

    with _quiet():
        return load_described(files, asked, name), source


def _architecture(
    name: str, pretrained: str | None, asked: Asked, cache_dir: str | None, seed: int
) -> tuple[Loaded, str | Path]:
    """Return an architecture with random weights, those of a tag, or those of files."""
    files = _weight_files(name, pretrained, cache_dir)
    if files is not None:
        with _quiet(), torch.random.fork_rng():
            torch.manual_seed(seed)
            return load_architecture(name, files, asked), files.folder

    for option in ("weights_of", "part", "leave_out"):
        if getattr(asked, option):
            what = "random weights" if pretrained is None else f"the tag {pretrained!r}"
            raise ConfigError(
                [f"{option}: it belongs to weights from a file, and {what} need none."], "backbone"
            )

    arguments = _weights_arguments(name, pretrained)
    if asked.facts.quick_gelu is not None:
        arguments["quick_gelu"] = asked.facts.quick_gelu

    try:
        with _quiet(), torch.random.fork_rng():
            torch.manual_seed(seed)
            model = open_clip.create_model(name, cache_dir=cache_dir, **arguments)
    except Exception as error:  # open_clip, the hub client and torch each raise their own kinds
        raise _explain(name, pretrained, error) from error

    text = (open_clip.get_model_config(name) or {})["text_cfg"]
    hf_context_length(model, text)
    return Loaded(model, dict(getattr(model.visual, "preprocess_cfg", {})), text), name


def _weight_files(name: str, pretrained: str | None, cache_dir: str | None) -> WeightFiles | None:
    """Return the files that ``pretrained`` means; None if it is a tag or nothing.

    Raises:
        BackboneError: If it looks like a path, and there is nothing.
        UnknownNameError: If it is neither a path nor a tag.
    """
    if pretrained is None:
        return None
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained in tags:
        return None
    if pretrained.startswith(HF_HUB):
        return fetch_weights(WeightsRepository(pretrained.removeprefix(HF_HUB), cache_dir), card=False)

    path = user_path(pretrained.removeprefix(LOCAL))
    if path.exists() or looks_like_path(pretrained):
        return find_weight_files(path, name)

    hint = (
        "Or give the path of a local weights file (safetensors, torch state dict, TorchScript archive), or of a folder "
        "that holds one."
    )
    raise UnknownNameError(f"weights tag of {name}", pretrained, tags, hint)


def _weights_arguments(name: str, pretrained: str | None) -> dict[str, Any]:
    """Return create_model's arguments for a tag or no weights, with the weights' own activation."""
    if pretrained is None:
        return {"pretrained": None, "pretrained_text": False}

    trained_with_quick = bool((open_clip.get_pretrained_cfg(name, pretrained) or {}).get("quick_gelu", False))
    built_with_quick = bool((open_clip.get_model_config(name) or {}).get("quick_gelu", False))
    arguments: dict[str, Any] = {"pretrained": pretrained}

    if trained_with_quick != built_with_quick:
        activation = "QuickGELU" if trained_with_quick else "GELU"
        log.info("%s/%s was trained with %s: using it.", name, pretrained, activation)
        arguments["quick_gelu"] = trained_with_quick

    return arguments


def _set_scale(model: Any, logit_scale: float | None, logit_bias: float | None) -> None:
    """Set the factor and the addend of cosine similarities, where they were asked for."""
    with torch.no_grad():
        if logit_scale is not None:
            model.logit_scale.fill_(math.log(logit_scale))
        if logit_bias is not None:
            if getattr(model, "logit_bias", None) is None:
                raise ConfigError(["logit_bias: this model has none; leave it out."], "backbone")
            model.logit_bias.fill_(logit_bias)


def _tokenizer(name: str, loaded: Loaded, source: str | Path, cache_dir: str | None) -> tuple[Any, str]:
    """Return the tokenizer of a model, or None and why there is none."""
    try:
        with _quiet():
            if loaded.card is not None and loaded.text:
                return _card_tokenizer(loaded.text, source, cache_dir), ""
            if name.startswith((HF_HUB, LOCAL)):
                return _transformers_tokenizer(loaded, source, cache_dir), ""
            return open_clip.get_tokenizer(name, cache_dir=cache_dir), ""
    except Exception as error:  # a missing package, an unreachable hub: both mean there is no tokenizer here
        return None, (
            f"the tokenizer of {name} could not be loaded ({reason_of(error)}). It is fetched from the Hugging Face "
            "Hub and needs the 'transformers' package: install it and go online once, or pass tokenizer=... (in a "
            f"configuration backbone.tokenizer=FOLDER). Images can be encoded without it. {_OFFLINE}"
        )


def _card_tokenizer(text: Mapping[str, Any], source: str | Path, cache_dir: str | None) -> Any:
    """Return the tokenizer that open_clip makes of a card; files of a folder come before those of a name."""
    options = dict(text.get("tokenizer_kwargs") or {})
    length = int(text.get("context_length", 77))
    name = text.get("hf_tokenizer_name")
    if not name:
        return SimpleTokenizer(context_length=length, **options)

    if isinstance(source, Path) and _has_tokenizer(source):
        name = str(source)
    mode = text.get("tokenizer_mode")
    return HFTokenizer(name, context_length=length, cache_dir=cache_dir, tokenizer_mode=mode, **options)


def _transformers_tokenizer(loaded: Loaded, source: str | Path, cache_dir: str | None) -> Any:
    """Return the tokenizer of a folder or repository in transformers' layout; CLIP's own if a folder has none."""
    vocabulary = loaded.model.text.vocab_size if hasattr(loaded.model, "text") else loaded.model.vocab_size
    folder = isinstance(source, Path)
    if vocabulary == _BYTE_PAIRS and not (folder and _has_tokenizer(Path(source))):
        return SimpleTokenizer(context_length=loaded.model.context_length)

    from transformers import AutoTokenizer  # only for those whose text tower is not CLIP's

    return AutoTokenizer.from_pretrained(str(source), cache_dir=cache_dir)


def _named_tokenizer(name: str, loaded: Loaded, cache_dir: str | None) -> Any:
    """Return a tokenizer of transformers from a folder or the Hub, with the options that the architecture sets."""
    path = user_path(name)
    options = dict(loaded.text.get("tokenizer_kwargs") or {})
    mode = loaded.text.get("tokenizer_mode")
    try:
        with _quiet():
            return HFTokenizer(
                str(path) if path.exists() else name,
                context_length=int(loaded.model.context_length),
                cache_dir=cache_dir,
                tokenizer_mode=mode,
                **options,
            )
    except Exception as error:  # transformers and the hub client raise many kinds
        raise BackboneError(f"tokenizer {name!r} could not be loaded: {reason_of(error)}.") from error


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / file).is_file() for file in _TOKENIZER_FILES)


def _explain(name: str, pretrained: str | None, error: Exception) -> BackboneError:
    reason = reason_of(error)
    if pretrained is None:
        return BackboneError(f"{name} can't be built: {reason}. {_OFFLINE}")

    entry = open_clip.get_pretrained_cfg(name, pretrained) or {}
    source = entry.get("hf_hub") or entry.get("url") or "the Hugging Face Hub"
    return BackboneError(
        f"the weights of {name}/{pretrained} could not be fetched: {reason}. "
        f"They come from {source}. Fetch them where there is a network and pass pretrained=PATH, or set HF_HOME to a "
        f"cache that holds them. {_OFFLINE}"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep open_clip's root-logger chatter out of a user's terminal; what matters is said by our own messages."""
    previous = logging.root.level
    ours = logging.getLogger("vlprompt")
    level = ours.level
    ours.setLevel(ours.getEffectiveLevel())  # ours inherits the root's level, which is raised
    logging.root.setLevel(logging.CRITICAL)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        logging.root.setLevel(previous)
        ours.setLevel(level)


def missing_files(name: str, pretrained: str | None, cache_dir: str | None = None) -> str | None:
    """Return what must be fetched, or does not exist, before a backbone can be built; None if nothing.

    Args:
        name: An architecture, ``hf-hub:org/name`` or ``local-dir:PATH``.
        pretrained: A tag, a path or nothing.
        cache_dir: Where downloaded weights are kept; None for the usual folders.
    """
    cache = None if cache_dir is None else user_path(cache_dir)
    place = name if name.startswith((HF_HUB, LOCAL)) else pretrained or ""
    if place.startswith(LOCAL):
        folder = user_path(place.removeprefix(LOCAL))
        return None if folder.is_dir() else f"the folder {folder} does not exist."
    if place.startswith(HF_HUB):
        repository, _, revision = place.removeprefix(HF_HUB).partition("@")
        files = [try_to_load_from_cache(repository, file, cache, revision or None) for file in WEIGHT_FILES]
        there = any(isinstance(file, str) for file in files)
        return None if there else f"{place} is not on this machine; the first run fetches it."

    entry = open_clip.get_pretrained_cfg(name, place) if place else {}
    if entry:
        if _is_fetched(entry, cache):
            return None
        return f"the weights {place!r} of {name} are not on this machine; the first run fetches them."
    if place and not user_path(place).exists():
        return f"the weights {place} of {name} do not exist."
    return None


def _is_fetched(entry: Mapping[str, Any], cache: Path | None) -> bool:
    """Return whether the file of a tag lies in its cache."""
    repository, files = hub_files(entry)
    if repository:
        return any(isinstance(try_to_load_from_cache(repository, file, cache), str) for file in files)

    folder = user_path("~/.cache/clip") if cache is None else cache
    return bool(entry.get("url")) and (folder / Path(entry["url"]).name).is_file()
