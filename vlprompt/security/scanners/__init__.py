"""Detectors of poisoned pictures: one file each, discovered, never listed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlprompt.backbones import Backbone
from vlprompt.core.options import check_options
from vlprompt.core.registry import Registry
from vlprompt.learners.dbom import DEFAULT_TRIGGERS
from vlprompt.security.scanners.base import Detector

__all__ = ["DETECTORS", "Detector", "create_detector", "list_detectors"]

DETECTORS: Registry[type[Detector]] = Registry("detector", "vlprompt.security.scanners")
"""Every detector by name, with its paper and needs: ``"pairs"`` to learn from, or ``"labels"`` of a whole set."""


def create_detector(
    name: str,
    backbone: Backbone,
    classnames: Sequence[str],
    triggers: Sequence[str] = DEFAULT_TRIGGERS,
    **options: Any,
) -> Detector:
    """Build a detector; most have to be fitted before they judge.

    Args:
        name: See :func:`list_detectors`.
        backbone: See :func:`vlprompt.create_backbone`.
        classnames: The objects.
        triggers: Names, the first for none.
        **options: The detector's own, see its class.

    Raises:
        UnknownNameError: For an unknown detector.
        ConfigError: For options it doesn't have or values it doesn't take, all at once.
    """
    entry = DETECTORS.get(name)
    checked = check_options(entry.target, options, f"detector {name!r}")
    detector = entry.target(backbone, classnames, triggers, **checked)
    detector.method = name
    return detector


def list_detectors() -> list[str]:
    """Return the sorted names of all detectors."""
    return DETECTORS.names()
