"""Personalised generation: teach a frozen text-to-image model a concept from a few images.

A method of learning the concept is one more file in this folder that registers itself.
"""

from __future__ import annotations

from typing import Any

from vlprompt.core.registry import Registry

__all__ = ["PERSONALISERS", "list_personalisers"]

PERSONALISERS: Registry[Any] = Registry("personaliser", "vlprompt.generation")
"""Every method of learning a concept, by name."""


def list_personalisers() -> list[str]:
    """Return the sorted names of all methods of learning a concept."""
    return PERSONALISERS.names()
