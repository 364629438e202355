"""The backbone of an experiment: built from its section, with what it reads and what may be missing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlprompt.backbones import Backbone, create_backbone, missing_weights, unknown_backbone
from vlprompt.core.files import path_fingerprint
from vlprompt.core.processes import accelerator
from vlprompt.experiments.config import BackboneOptions
from vlprompt.saved.weight_masks import fold, read_masks

__all__ = ["backbone_problems", "backbone_sources", "build_backbone", "missing_backbone"]


def build_backbone(options: BackboneOptions) -> Backbone:
    """Return the backbone that a ``backbone:`` section describes, saved masks folded into its image tower.

    It is on the section's device; without one, on that of this process.

    Raises:
        UnknownNameError: For an unknown name or tag.
        BackboneError: If weights can't be fetched or don't fit, or the device isn't there.
        CheckpointError: If the masks are missing, damaged or of another backbone.
    """
    own = accelerator().device
    # Of several processes on processors each has a numbered one, and there is only one to name.
    name = "cpu" if own.type == "cpu" else str(own)
    device = name if options.device is None else options.device
    backbone = create_backbone(options.name, **{**options.arguments(), "device": device})
    if options.masks is None:
        return backbone
    return fold(backbone, read_masks(options.masks, backbone))


def backbone_sources(options: BackboneOptions) -> dict[str, str]:
    """Return path to fingerprint of the files that the backbone is read from (see ``Experiment.sources``)."""
    return {path: path_fingerprint(path) for path in options.paths()}


def missing_backbone(options: BackboneOptions) -> list[str]:
    """Return what is missing to build the backbone, a sentence each (see ``Experiment.missing``)."""
    sentences = []
    weights = missing_weights(options.name, options.pretrained, options.cache_dir)
    if weights is not None:
        sentences.append(weights)
    if options.masks is not None and path_fingerprint(options.masks) == "absent":
        sentences.append(f"the masks {options.masks} do not exist.")
    return sentences


def backbone_problems(content: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the name of the backbone (see ``ExperimentConfig.raw_problems``).

    Args:
        content: A whole configuration.
    """
    section = content.get("backbone")
    name = section.get("name", "tiny") if isinstance(section, Mapping) else "tiny"
    problem = unknown_backbone(name) if isinstance(name, str) else None
    return [] if problem is None else [f"backbone.name: {problem}"]
