"""Text-prompted segmentation: models, what of them is tuned, and how it is measured."""

from __future__ import annotations

from typing import Any

from vlprompt.backbones import Backbone
from vlprompt.core.errors import ConfigError, nearest
from vlprompt.core.options import check_options, check_type, options_model
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
        DataError: If something else is given in the backbone's place.
        VLPromptError: If the strategy can't work on this model; says why.
    """
    check_type(backbone, Backbone, "a backbone", "vlprompt.create_backbone(...)")
    model_type = SEGMENTERS.get(name).target
    strategy_type = STRATEGIES.get(strategy).target
    model_fields = options_model(model_type).model_fields
    strategy_fields = options_model(strategy_type).model_fields

    allowed = {*model_fields, *strategy_fields}
    problems = [_unknown(key, allowed) for key in options if key not in allowed]
    if problems:
        raise ConfigError(problems, f"segmenter {name!r} with {strategy!r}")

    # An option that both have, such as the seed, goes to both.
    of_model = {key: value for key, value in options.items() if key in model_fields}
    of_strategy = {key: value for key, value in options.items() if key in strategy_fields}
    of_model = check_options(model_type, of_model, f"segmenter {name!r}")
    of_strategy = check_options(strategy_type, of_strategy, f"strategy {strategy!r}")

    segmenter = model_type(backbone, strategy_type(backbone, **of_strategy), **of_model)
    segmenter.method = name
    segmenter.options = {"strategy": strategy, **options}
    return segmenter.to(backbone.device).eval()


def list_segmenters() -> list[str]:
    """Return the sorted names of all segmentation models."""
    return SEGMENTERS.names()


def _unknown(key: str, allowed: set[str]) -> str:
    close = nearest(key, allowed, count=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"{key}: unknown key{hint} Known: {', '.join(sorted(allowed))}."
