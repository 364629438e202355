"""Weights that people own: where they lie, what is in them, what they say of themselves. Nothing in them is run."""

from __future__ import annotations

__all__ = ["WeightsError"]


class WeightsError(Exception):
    """Why weights can't be used, as the middle of a sentence; whoever knows their name and use makes a whole one."""
