"""Segmentation models that adapt themselves to every image: one file per method, discovered, never listed."""

from __future__ import annotations

from typing import Any

from vlprompt.core.options import check_options
from vlprompt.core.registry import Registry
from vlprompt.segmentation.adapters.base import AdaptedSegmenter
from vlprompt.segmentation.base import Segmenter

__all__ = ["SEGMENTATION_ADAPTERS", "AdaptedSegmenter", "create_segmentation_adapter"]

SEGMENTATION_ADAPTERS: Registry[type[AdaptedSegmenter]] = Registry(
    "segmentation adapter", "vlprompt.segmentation.adapters"
)
"""Every method by name, with its paper."""


def create_segmentation_adapter(name: str, segmenter: Segmenter, **options: Any) -> AdaptedSegmenter:
    """Build a segmentation model that tunes another one's prompts on each image before it answers.

    It is used like any segmentation model: ``adapter(images, texts)``, ``evaluate_segmenter``, ``predict_mask``.

    Args:
        name: A name in :data:`SEGMENTATION_ADAPTERS`.
        segmenter: Its prompts are where every image starts from; never changed.
        **options: The method's own, see its class.

    Raises:
        UnknownNameError: For an unknown method.
        ConfigError: For options that it doesn't have or values that it doesn't take, all at once.
        DataError: If the segmenter has no prompts.
    """
    entry = SEGMENTATION_ADAPTERS.get(name)
    checked = check_options(entry.target, options, f"segmentation adapter {name!r}")
    adapter = entry.target(segmenter, **checked)
    adapter.method = name
    adapter.options = checked
    return adapter
