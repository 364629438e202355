"""What is tuned of a segmentation model: one file per strategy, which registers itself."""

from __future__ import annotations

from vlprompt.core.registry import Registry
from vlprompt.segmentation.strategies.base import Rows, Strategy

__all__ = ["STRATEGIES", "Rows", "Strategy"]

STRATEGIES: Registry[type[Strategy]] = Registry("strategy", "vlprompt.segmentation.strategies")
"""Every strategy by name, with its paper."""
