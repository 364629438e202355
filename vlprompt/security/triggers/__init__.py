"""Triggers: one file each, discovered, never listed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlprompt.core.errors import DataError
from vlprompt.core.options import check_options
from vlprompt.core.registry import Registry
from vlprompt.security.triggers.base import NATIVE_SIZE, Composed, Trigger

__all__ = ["CLEAN", "NATIVE_SIZE", "TRIGGERS", "Trigger", "create_trigger", "list_triggers", "trigger_words"]

CLEAN = "clean"
"""The name of no trigger; always the first of a list of triggers."""

TRIGGERS: Registry[type[Trigger]] = Registry("trigger", "vlprompt.security.triggers")
"""Every trigger by name, with the paper that published the attack."""


def create_trigger(name: str, *, size: int = NATIVE_SIZE, seed: int = 1, **options: Any) -> Trigger:
    """Build a trigger.

    Args:
        name: See :func:`list_triggers`; several joined by ``+`` are put into an image one after the other.
        size: Native size in pixels.
        seed: Of what a trigger draws.
        **options: The trigger's own, see its class; only for a single one.

    Raises:
        UnknownNameError: For an unknown trigger.
        ConfigError: For options it doesn't have or values it doesn't take, all at once.
        DataError: If the size is too small, or several triggers are given options.
    """
    parts = name.split("+")
    if len(parts) > 1:
        if options:
            raise DataError(
                f"{name}: options can't be given to several triggers at once ({', '.join(options)})."
            )
        return Composed([create_trigger(part, size=size, seed=seed) for part in parts])
    target = TRIGGERS.get(name).target
    given = check_options(target, {"size": size, "seed": seed, **options}, f"trigger {name!r}")
    trigger = target(**given)
    trigger.name = name
    return trigger


def list_triggers() -> list[str]:
    """Return the sorted names of all triggers."""
    return TRIGGERS.names()


def trigger_words(names: Sequence[str]) -> tuple[str, ...]:
    """Return what a person would call each trigger; a name nobody knows is taken for words itself."""
    return tuple(
        "clean"
        if name == CLEAN
        else " and ".join(
            TRIGGERS.get(n).target.words if n in TRIGGERS else n.replace("_", " ") for n in name.split("+")
        )
        for name in names
    )
