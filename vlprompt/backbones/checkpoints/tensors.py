"""What is in a file of weights: its tensors by name, without what trainers wrap around them."""

from __future__ import annotations

import logging
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vlprompt.backbones.checkpoints import WeightsError
from vlprompt.backbones.checkpoints.archive import is_archive, read_archive
from vlprompt.backbones.checkpoints.files import WeightFiles
from vlprompt.core.errors import first_line

__all__ = ["Weights", "read_weights", "reason_of"]

log = logging.getLogger("vlprompt.backbones")

_CONTAINERS = ("state_dict", "model_state_dict", "model", "module", "net", "weights")
_WRAPPERS = ("_orig_mod.", "module.")  # of torch.compile and of training on several devices
_TOWERS = ("visual.", "vision_model.", "image_encoder.")  # one of them is in every layout of a dual encoder


@dataclass(frozen=True)
class Weights:
    """Tensors by the names that the model's own code gives them.

    Attributes:
        tensors: Name to tensor.
        from_archive: Whether they come from a TorchScript archive.
        quick_gelu: What an archive's code says of its activation; None if nothing does.
    """

    tensors: dict[str, Tensor]
    from_archive: bool = False
    quick_gelu: bool | None = None


def read_weights(files: WeightFiles, part: str | None = None) -> Weights:
    """Read weights. No code in the files can run.

    Args:
        files: See :func:`vlprompt.backbones.checkpoints.files.find_weight_files`.
        part: Which part is meant, where a file holds several models: a key of the file (``"model_ema"``), or what
            the names begin with (``"student."``).

    Raises:
        WeightsError: If a file is damaged, holds code, no tensors, or more than one model.
    """
    if len(files.parts) == 1 and is_archive(files.parts[0]):
        archive = read_archive(files.parts[0])
        return Weights(_without_wrappers(archive.tensors, part), True, archive.quick_gelu)

    content: dict[str, Any] = {}
    for path in files.parts:
        content.update(_content(path))

    tensors, part = _tensors(content, part)
    return Weights(_without_wrappers(tensors, part))


def reason_of(error: Exception) -> str:
    """Return an error of another library as the middle of a sentence."""
    if "weights_only" in str(error):  # torch's own text advises to run the pickled code
        return "it holds more than plain tensors"
    return first_line(error).rstrip(".")


def _content(path: Path) -> Mapping[str, Any]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # A plain torch.save of today is a zip file, whose tensors need not all be in memory at once.
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"it is no readable file of weights ({reason_of(error)})") from error
    except Exception as error:  # torch raises many kinds on damaged bytes and on code
        raise WeightsError(reason_of(error)) from error

    if not isinstance(loaded, Mapping):
        raise WeightsError(f"it holds a {type(loaded).__name__}, not tensors by name")
    return loaded


def _tensors(content: Mapping[str, Any], part: str | None) -> tuple[dict[str, Tensor], str | None]:
    """Return the tensors of a checkpoint, and what of ``part`` is still to be applied to their names."""
    if part is not None and isinstance(content.get(part), Mapping):
        return _only_tensors(content[part]), None

    inside = [key for key in _CONTAINERS if _holds_tensors(content.get(key))]
    if len(inside) > 1:
        raise WeightsError(_ambiguous(inside))
    if inside:
        return _tensors(content[inside[0]], part)

    tensors = _only_tensors(content)
    if not tensors:
        keys = ", ".join(str(key) for key in list(content)[:10])
        raise WeightsError(f"it holds no tensors by name (its keys: {keys or 'none'})")
    return tensors, part


def _holds_tensors(value: Any) -> bool:
    """Return whether a value is tensors by name, or a checkpoint around some."""
    if not isinstance(value, Mapping):
        return False
    tensors = any(isinstance(inner, Tensor) for inner in value.values())
    return tensors or any(_holds_tensors(value.get(key)) for key in _CONTAINERS)


def _only_tensors(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return what is a tensor; numbers and settings that stand between tensors are counted in the log."""
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if tensors and len(tensors) < len(content):
        log.debug("%d entries beside the weights are no tensors.", len(content) - len(tensors))
    return tensors


def _without_wrappers(tensors: Mapping[str, Tensor], part: str | None) -> dict[str, Tensor]:
    """Return tensors by the model's own names: without what compiling, distributing and wrapping put before them."""
    names = {name: _bare(name) for name in tensors}
    prefix = _prefix(names.values(), part)
    return {bare.removeprefix(prefix): tensors[name] for name, bare in names.items()}


def _bare(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = re.sub(rf"(^|\.){re.escape(wrapper)}", r"\1", name)
    return name


def _prefix(names: Iterable[str], part: str | None) -> str:
    """Return what stands before the names of both towers, such as ``model.``."""
    names = list(names)
    prefixes = sorted({prefix for name in names if (prefix := _before_tower(name)) is not None})

    if part is not None:
        wanted = part.rstrip(".") + "."
        if not any(name.startswith(wanted) for name in names):
            known = ", ".join(repr(prefix) for prefix in prefixes if prefix) or "none"
            raise WeightsError(f"nothing in it is called {part!r} (beginnings of names: {known})")
        return wanted

    if len(prefixes) > 1 and "" not in prefixes:
        raise WeightsError(_ambiguous(prefixes))
    return "" if len(prefixes) != 1 else prefixes[0]


def _before_tower(name: str) -> str | None:
    for tower in _TOWERS:
        if name.startswith(tower):
            return ""
        before, found, _ = name.partition(f".{tower}")
        if found:
            return f"{before}."
    return None


def _ambiguous(parts: list[str]) -> str:
    return (
        f"it holds several models: {', '.join(repr(part) for part in parts)}. Say which is meant: part={parts[0]!r} "
        f"in Python, backbone.part={parts[0]} in a configuration"
    )
