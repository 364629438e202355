"""Sources of pairs: one file per way in which images, masks and phrases lie on disk.

A source is a function ``build(request, *, option=default, ...)`` that returns one split as a ``MaskDataset``; its
keyword-only parameters are the options that ``load_segmentation`` takes for it.
"""

from __future__ import annotations

from collections.abc import Callable

from vlprompt.core.registry import Registry
from vlprompt.data.segmentation.base import MaskDataset

__all__ = ["BuildPairs", "pair_sources"]

BuildPairs = Callable[..., MaskDataset]
pair_sources: Registry[BuildPairs] = Registry("pair source", "vlprompt.data.segmentation.sources")
