"""Scanners of poisoned images: one file each, discovered, never listed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlprompt.backbones import Backbone
from vlprompt.core.options import check_options
from vlprompt.core.registry import Registry
from vlprompt.data.triggers import DEFAULT_TRIGGERS
from vlprompt.security.scanners.base import Scanner

__all__ = ["SCANNERS", "Scanner", "create_scanner", "list_scanners"]

SCANNERS: Registry[type[Scanner]] = Registry("scanner", "vlprompt.security.scanners")
"""Every scanner by name, with its paper and needs: ``"compositions"`` to learn from, or ``"labels"`` of a whole set."""


def create_scanner(
    name: str,
    backbone: Backbone,
    classnames: Sequence[str],
    triggers: Sequence[str] = DEFAULT_TRIGGERS,
    **options: Any,
) -> Scanner:
    """Build a scanner; most have to be fitted before they judge.

    Args:
        name: See :func:`list_scanners`.
        backbone: See :func:`vlprompt.create_backbone`.
        classnames: The C objects.
        triggers: T names, the first ``"clean"``.
        **options: Of this scanner, see its class.

    Raises:
        UnknownNameError: For an unknown scanner.
        ConfigError: For options that the scanner doesn't have or values it doesn't take, all at once.
    """
    entry = SCANNERS.get(name)
    checked = check_options(entry.target, options, f"scanner {name!r}")
    scanner = entry.target(backbone, classnames, triggers, **checked)
    scanner.method = name
    return scanner


def list_scanners() -> list[str]:
    """Return the sorted names of all scanners."""
    return SCANNERS.names()
