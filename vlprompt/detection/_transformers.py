"""Building transformers' detectors: from the Hub, from a folder, or random ones from a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from textwrap import shorten
from typing import Any

from vlprompt.core.errors import BackboneError
from vlprompt.core.seeding import seeded_modules

__all__ = ["build_model"]

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
            model = kind.from_pretrained(pretrained, use_safetensors=True)  # no pickle is ever loaded
        else:
            with seeded_modules(seed, "detector", classname):
                model = kind(kind.config_class(**(config or {})))
    except Exception as error:  # the hub client, transformers and torch each raise their own kinds
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        reason = shorten(text, 300, placeholder=" ...").rstrip(".")
        raise BackboneError(
            f"{classname} {pretrained or 'with this configuration'} can't be built: {reason}. Weights come from the "
            f"Hugging Face Hub: fetch them where there is a network and name the folder. {_OFFLINE}"
        ) from error
    return model.requires_grad_(False).eval()
