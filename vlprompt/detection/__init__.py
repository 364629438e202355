"""Open-vocabulary detection: models whose language side enters as embeddings, and the search of concepts for them."""

from __future__ import annotations

from typing import Any

from vlprompt.core.options import check_options
from vlprompt.core.registry import Registry
from vlprompt.detection.base import Detections, Detector

__all__ = ["DETECTORS", "Detections", "Detector", "create_detector", "list_detectors"]

DETECTORS: Registry[type[Detector]] = Registry("detector", "vlprompt.detection")
"""Every kind of detector by name."""


def create_detector(name: str, **options: Any) -> Detector:
    """Build a frozen detector.

    Args:
        name: See :func:`list_detectors`.
        **options: The detector's own, see its class; transformers' models take ``pretrained``, a name on the Hugging
            Face Hub or a local folder.

    Raises:
        UnknownNameError: For an unknown detector.
        ConfigError: For options it doesn't have or values it doesn't take, all at once.
        BackboneError: If a package or weights can't be had; says what to do.
    """
    entry = DETECTORS.get(name)
    detector = entry.target(**check_options(entry.target, options, source=f"detector {name!r}"))
    detector.method = name
    return detector.requires_grad_(False).eval()


def list_detectors() -> list[str]:
    """Return the sorted names of all detectors."""
    return DETECTORS.names()
