"""Images that diffusion models make of images: generators behind one interface, and where their work is kept.

An embedded generator is one more file in this folder that registers itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlprompt.core.options import check_options
from vlprompt.core.registry import Registry
from vlprompt.diffusion.base import Generator, ViewSource
from vlprompt.diffusion.store import ViewStore

__all__ = [
    "GENERATORS",
    "Generator",
    "ViewSource",
    "ViewStore",
    "create_generator",
    "list_generators",
    "missing_generator",
]

GENERATORS: Registry[type[Generator]] = Registry("generator", "vlprompt.diffusion")
"""Every kind of generator by name."""


def create_generator(name: str, **options: Any) -> Generator:
    """Build a generator of variations of images.

    Args:
        name: See :func:`list_generators`.
        **options: The generator's own, see its class; those of diffusers' pipelines take ``pipeline``, a name on the
            Hugging Face Hub or a local folder.

    Raises:
        UnknownNameError: For an unknown generator.
        ConfigError: For options it doesn't have or values it doesn't take, all at once.
        BackboneError: If a package or the pipeline's weights can't be had; says what to do.
    """
    entry = GENERATORS.get(name)
    return entry.target(**check_options(entry.target, options, source=f"generator {name!r}"))


def list_generators() -> list[str]:
    """Return the sorted names of all generators."""
    return GENERATORS.names()


def missing_generator(name: str, options: Mapping[str, Any]) -> str | None:
    """Return what must be fetched or installed before a generator can be built, as a sentence; None if nothing.

    Args:
        name: See :func:`list_generators`.
        options: See :func:`create_generator`.

    Raises:
        UnknownNameError: For an unknown generator.
    """
    return GENERATORS.get(name).target.missing(options)
