"""Text-prompted segmentation: models, what of them is tuned, and how it is measured."""

from __future__ import annotations

from typing import Any

from vlprompt.backbones import Backbone
from vlprompt.core.errors import ConfigError, nearest
from vlprompt.core.options import check_options, options_model
from vlprompt.core.registry import Registry
from vlprompt.segmentation.base import Segmenter
from vlprompt.segmentation.strategies import STRATEGIES

__all__ = ["SEGMENTERS", "STRATEGIES", "Segmenter", "create_segmenter", "list_segmenters"]

SEGMENTERS: Registry[type[Segmenter]] = Registry("segmenter", "vlprompt.segmentation")
"""Every segmentation model by name."""


def create_segmenter(name: str, backbone: Backbone, strategy: str = "zero_shot", **options: Any) -> Segmenter:
    """Build a segmentation model on a backbone, and what of it is tuned.

    Args:
        name: See :func:`list_segmenters`.
        backbone: See :func:`vlprompt.create_backbone`; shared and never changed (``end_to_end`` copies it).
        strategy: What is learned: a name in :data:`STRATEGIES`.
        **options: The model's own (see its class) and the strategy's own (see its class).

    Raises:
        UnknownNameError: For an unknown model or strategy.
        ConfigError: For options that neither has or values they don't take, all at once.
        BackboneError: If model or strategy can't work on this backbone; says why.
        VLPromptError: If the strategy can't work on this model; says why.
    """
    model, tuned = SEGMENTERS.get(name), STRATEGIES.get(strategy)
    mine, theirs = options_model(model.target).model_fields, options_model(tuned.target).model_fields
    if unknown := [key for key in options if key not in mine and key not in theirs]:
        raise ConfigError(
            [_unknown(key, {*mine, *theirs}) for key in unknown], f"segmenter {name!r} with {strategy!r}"
        )
    kept = check_options(model.target, {k: v for k, v in options.items() if k in mine}, f"segmenter {name!r}")
    given = check_options(
        tuned.target, {k: v for k, v in options.items() if k in theirs}, f"strategy {strategy!r}"
    )
    built = model.target(backbone, tuned.target(backbone, **given), **kept)
    built.method, built.options = name, {"strategy": strategy, **options}
    return built.to(backbone.device).eval()


def list_segmenters() -> list[str]:
    """Return the sorted names of all segmentation models."""
    return SEGMENTERS.names()


def _unknown(key: str, known: set[str]) -> str:
    close = nearest(key, known, count=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"{key}: unknown key{hint} Known: {', '.join(sorted(known))}."
