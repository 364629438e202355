"""What weights were trained with: their activation and how their images were prepared.

A file of weights holds numbers alone. The facts that belong to them come, in this order, from what was asked for by
name, from a tag that they are said to be like, from the card beside them, from what is known of the file itself, and
from the architecture's published weights where all of these agree. Where they don't, nothing is guessed.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
from open_clip.transform import PreprocessCfg, merge_preprocess_dict

from vlprompt.backbones.checkpoints.cards import PREPROCESS_FIELDS
from vlprompt.core.errors import BackboneError, UnknownNameError

__all__ = ["Facts", "facts_of_file", "facts_of_tag", "hub_files", "published_as", "resolve_facts"]

log = logging.getLogger("vlprompt.backbones")

_SHOWN = 3  # tags that an error names per reading
_OPENAI_CODE = "https://openaipublic."  # where the URLs of OpenAI's own archives begin


@dataclass(frozen=True)
class Facts:
    """What one source says of weights.

    Attributes:
        source: What says so, for messages.
        quick_gelu: Whether they were trained with QuickGELU; None if it doesn't say.
        preprocess: Fields of ``PreprocessCfg``, those that it says.
    """

    source: str
    quick_gelu: bool | None = None
    preprocess: Mapping[str, Any] = field(default_factory=dict)

    def get(self, key: str) -> Any:
        """Return one fact by its name; None if the source doesn't say."""
        return self.quick_gelu if key == "quick_gelu" else self.preprocess.get(key)


def facts_of_tag(name: str, tag: str) -> Facts:
    """Return what open_clip knows of published weights.

    Args:
        name: An architecture.
        tag: One of its tags, or ``"ARCHITECTURE/tag"`` of another one.

    Raises:
        UnknownNameError: If there is no such tag.
    """
    architecture, _, short = tag.rpartition("/")
    architecture = architecture or name
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if short not in tags:
        hint = "Tags of another architecture are named with it: 'ViT-B-16/openai'."
        raise UnknownNameError(f"weights tag of {architecture}", tag, tags, hint)

    entry = open_clip.get_pretrained_cfg(architecture, short)
    preprocess = merge_preprocess_dict(PreprocessCfg(), entry)
    return Facts(
        f"{architecture}/{short}",
        bool(entry.get("quick_gelu", False)),
        {key: preprocess[key] for key in PREPROCESS_FIELDS},
    )


def facts_of_file(name: str, path: Path) -> Facts | None:
    """Return what is known of a file because it is one that was published; None if it is not known.

    It is known if it lies in the Hub's cache under the repository of a tag, or if it has the name and the checksum of
    a tag's download.
    """
    tag = published_as(name, path)
    return None if tag is None else facts_of_tag(name, tag)


def published_as(name: str, path: Path) -> str | None:
    """Return the tag of the architecture whose published file this is; see :func:`facts_of_file`."""
    for tag in open_clip.list_pretrained_tags_by_model(name):
        entry = open_clip.get_pretrained_cfg(name, tag)
        repository, _ = hub_files(entry)
        if repository and f"models--{repository.replace('/', '--')}" in path.absolute().parts:
            return tag

        url = entry.get("url", "")
        checksum = _checksum(url)
        if checksum and path.name == Path(url).name and _sha256(path).startswith(checksum):
            return tag

    return None


def hub_files(entry: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """Return the repository of a tag's weights on the Hub ("" if they are not there), and the names they may have.

    Args:
        entry: open_clip's ``get_pretrained_cfg``: ``hf_hub`` is ``org/name/``, or ``org/name/file``.
    """
    repository, _, file = str(entry.get("hf_hub", "")).rpartition("/")
    if not file:
        return repository, ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    return repository, (f"{Path(file).stem}.safetensors", file)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _checksum(url: str) -> str:
    """Return the beginning of the SHA-256 that an address of published weights carries."""
    if url.startswith(_OPENAI_CODE):
        return url.split("/")[-2]
    return Path(url).stem.rpartition("-")[2] if "mlfoundations" in url else ""


def resolve_facts(
    name: str,
    path: Path,
    asked: Facts,
    sources: list[Facts],
) -> Facts:
    """Return every fact of weights that are read from a file.

    Args:
        name: Their architecture.
        path: Their file, for messages.
        asked: What was asked for by name.
        sources: What is known of them, best first.

    Raises:
        BackboneError: If nothing says a fact, and the architecture's published weights differ in it; lists their
            readings, and what to type.
    """
    keys = ("quick_gelu", *PREPROCESS_FIELDS)
    known = [asked, *sources]
    facts = {key: next((s.get(key) for s in known if s.get(key) is not None), None) for key in keys}
    open_keys = [key for key in keys if facts[key] is None]

    if open_keys:
        tags = [facts_of_tag(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)]
        facts |= _agreed(name, path, open_keys, tags) if tags else _defaults(name, path, open_keys)

    preprocess = {key: facts[key] for key in PREPROCESS_FIELDS}
    for source in known:
        if source.preprocess.get("fill_color"):
            preprocess.setdefault("fill_color", source.preprocess["fill_color"])
    return Facts(str(path), facts["quick_gelu"], preprocess)


def _agreed(name: str, path: Path, keys: list[str], tags: list[Facts]) -> dict[str, Any]:
    """Return what all published weights of the architecture agree in."""
    readings = {key: _readings(key, tags) for key in keys}
    differing = {key: values for key, values in readings.items() if len(values) > 1}
    if differing:
        raise BackboneError(_ask(name, path, differing))

    log.info("%s: %s as all published weights of %s.", path, ", ".join(keys), name)
    return {key: tags[0].get(key) for key in keys}


def _readings(key: str, tags: list[Facts]) -> dict[str, list[str]]:
    """Return the values that tags give a fact, each with the tags that do."""
    readings: dict[str, list[str]] = {}
    for tag in tags:
        readings.setdefault(_written(tag.get(key)), []).append(tag.source.rpartition("/")[2])
    return readings


def _ask(name: str, path: Path, differing: Mapping[str, Mapping[str, list[str]]]) -> str:
    lines = [f"{path} does not say how its weights were trained, and the published weights of {name} differ:"]
    for key, values in differing.items():
        for value, tags in values.items():
            more = f" and {len(tags) - _SHOWN} more" if len(tags) > _SHOWN else ""
            lines.append(f"  - {key} {value}: {', '.join(tags[:_SHOWN])}{more}")

    # The weights that most people mean are those that the first tag of each reading stands for.
    first = next(iter(next(iter(differing.values())).values()))[0]
    python, yaml = _by_name(differing)
    lines += [
        f"Say which they are like: weights_of={first!r} in Python, backbone.weights_of={first} in a configuration or "
        "on the command line;",
        f"or say what they were trained with: {python} in Python, {yaml} in a configuration.",
    ]
    if "quick_gelu" in differing:
        lines.append(
            "A model that was fine-tuned has the activation that it started from; one that open_clip trained from "
            "random weights has quick_gelu=False unless --force-quick-gelu was given."
        )
    return "\n".join(lines)


def _by_name(differing: Mapping[str, Mapping[str, list[str]]]) -> tuple[str, str]:
    """Return what to type to say each fact by its name, in Python and in a configuration."""
    python, yaml = [], []
    fields = {}

    for key, values in differing.items():
        value = next(iter(values))
        if key == "quick_gelu":
            python.append(f"quick_gelu={value.capitalize()}")
            yaml.append(f"backbone.quick_gelu={value}")
        else:
            fields[key] = value
            yaml.append(f"backbone.preprocess.{key}={value}")

    if fields:
        inside = ", ".join(
            f"'{key}': {value if value.startswith('[') else repr(value)}" for key, value in fields.items()
        )
        python.append(f"preprocess={{{inside}}}")
    return ", ".join(python), " ".join(yaml)


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _defaults(name: str, path: Path, keys: list[str]) -> dict[str, Any]:
    """Return what open_clip trains an architecture with that has no published weights, and say so."""
    config = open_clip.get_model_config(name) or {}
    defaults = {"quick_gelu": bool(config.get("quick_gelu", False)), **_default_preprocessing()}
    facts = {key: defaults[key] for key in keys}

    log.warning(
        "%s does not say how its weights were trained, and %s has no published weights: %s is used, as open_clip "
        "trains unless it is told otherwise. If that is wrong, name a tag they are like (weights_of=ViT-B-16/openai), "
        "or quick_gelu=... and preprocess={...}.",
        *(path, name, ", ".join(f"{key} {_written(value)}" for key, value in facts.items())),
    )
    return facts


def _default_preprocessing() -> dict[str, Any]:
    config = PreprocessCfg()
    return {key: getattr(config, key) for key in PREPROCESS_FIELDS}
