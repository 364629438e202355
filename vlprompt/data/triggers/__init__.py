"""Backdoor triggers: one file each, discovered, never listed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlprompt.core.errors import DataError
from vlprompt.core.options import check_options
from vlprompt.core.registry import Registry
from vlprompt.data.triggers.base import (
    NATIVE_SIZE,
    OWN_SIZE,
    Composed,
    NativeSize,
    Trigger,
    size_label,
    size_of,
)

__all__ = [
    "CLEAN",
    "DEFAULT_TRIGGERS",
    "NATIVE_SIZE",
    "OWN_SIZE",
    "TRIGGERS",
    "NativeSize",
    "Trigger",
    "create_trigger",
    "list_triggers",
    "size_label",
    "size_of",
    "trigger_words",
]

CLEAN = "clean"
"""The name of no trigger; always the first of a list of triggers."""

DEFAULT_TRIGGERS = (CLEAN, "badnets", "blended", "bpp", "ftrojan", "sig", "trojan", "wanet")
"""The triggers that scanners learn to name unless others are asked for."""

TRIGGERS: Registry[type[Trigger]] = Registry("trigger", "vlprompt.data.triggers")
"""Every trigger by name, with the paper that published the attack."""


def create_trigger(name: str, *, size: int | None = NATIVE_SIZE, seed: int = 1, **options: Any) -> Trigger:
    """Build a trigger.

    Args:
        name: See :func:`list_triggers`; several joined by ``+`` are put into an image one after the other.
        size: Native size in pixels; None to leave every image at its own size.
        seed: Of what a trigger draws.
        **options: Of this trigger, see its class; only for a single one.

    Raises:
        UnknownNameError: For an unknown trigger.
        ConfigError: For options that the trigger doesn't have or values it doesn't take, all at once.
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
    checked = check_options(target, {"size": size, "seed": seed, **options}, f"trigger {name!r}")
    trigger = target(**checked)
    trigger.name = name
    return trigger


def list_triggers() -> list[str]:
    """Return the sorted names of all triggers."""
    return TRIGGERS.names()


def trigger_words(names: Sequence[str]) -> tuple[str, ...]:
    """Return what a person would call each trigger; a name that no trigger has is taken for words itself."""
    words = []
    for name in names:
        if name == CLEAN:
            words.append(CLEAN)
        else:
            words.append(" and ".join(_words_of(part) for part in name.split("+")))
    return tuple(words)


def _words_of(name: str) -> str:
    if name in TRIGGERS:
        return TRIGGERS.get(name).target.words
    return name.replace("_", " ")
