"""Building transformers' detectors: from the Hub, from a folder, or random ones from a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn
from torch.utils import _pytree

from vlprompt.core.devices import DTYPES
from vlprompt.core.errors import BackboneError, first_line
from vlprompt.core.paths import local_or_name, user_path
from vlprompt.core.precision import Precision
from vlprompt.core.seeding import seeded_modules

__all__ = ["build_model", "is_fetched", "run_in"]

_OFFLINE = "What works offline: the embedded detector owl-tiny, or random weights (pretrained=None)."


def build_model(classname: str, pretrained: str | None, config: Mapping[str, Any] | None, seed: int) -> Any:
    """Return a model of transformers, frozen and in evaluation mode.

    Args:
        classname: Of the model.
        pretrained: A name on the Hub or a folder; None builds random weights.
        config: Fields of the configuration of random weights; None: the published size.
        seed: Of random weights.

    Raises:
        BackboneError: If the package or the weights can't be had; says what to do.
    """
    try:
        import transformers
    except ImportError as error:
        raise BackboneError(
            f"this detector needs the package transformers ({error}). Install it: pip install 'vlprompt[detection]'."
        ) from error

    kind = getattr(transformers, classname)
    try:
        if pretrained is not None:
            model = kind.from_pretrained(
                local_or_name(pretrained), use_safetensors=True
            )  # no pickle is ever loaded
        else:
            with seeded_modules(seed, "detector", classname):
                model = kind(kind.config_class(**(config or {})))
    except Exception as error:  # the hub client, transformers and torch each raise their own kinds
        reason = first_line(error).rstrip(".")
        raise BackboneError(
            f"{classname} {pretrained or 'with this configuration'} can't be built: {reason}. Weights come from the "
            f"Hugging Face Hub: fetch them where there is a network and name the folder. {_OFFLINE}"
        ) from error

    return model.requires_grad_(False).eval()


def is_fetched(pretrained: str) -> bool:
    """Return whether weights are on this machine: a folder, or a name on the Hub whose files are in the cache."""
    if user_path(pretrained).exists():
        return True
    return isinstance(try_to_load_from_cache(pretrained, "config.json"), str)


def run_in(part: nn.Module, precision: Precision) -> None:
    """Store and run a frozen part of a model in a precision; what it reads is cast, what it returns is float32."""
    if precision == "fp32":
        return
    dtype = DTYPES[precision]

    def enter(_: nn.Module, inputs: Any, named: Any) -> Any:
        return _pytree.tree_map(lambda value: _cast(value, dtype), (inputs, named))

    def leave(_: nn.Module, inputs: Any, output: Any) -> Any:
        return _pytree.tree_map(lambda value: _cast(value, DTYPES["fp32"]), output)

    part.to(dtype)
    part.register_forward_pre_hook(enter, with_kwargs=True)
    part.register_forward_hook(leave)


def _cast(value: Any, dtype: Any) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
