"""What the page asks: one learner, one segmenter and perhaps a scanner, from saved prompts or built for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vlprompt.backbones import Backbone, create_backbone
from vlprompt.classification.predict import for_classes
from vlprompt.core.errors import ConfigError
from vlprompt.data import load_dataset
from vlprompt.learners import Learner, create_learner
from vlprompt.learners._scanning import ImageScanner
from vlprompt.saved.prompts import build_learner, read
from vlprompt.saved.rebuild import build_from
from vlprompt.segmentation import Segmenter, create_segmenter
from vlprompt.segmentation._weights import embedded
from vlprompt.segmentation.evaluate import build_segmenter

__all__ = ["EXAMPLES", "DemoModels", "load_models"]

EXAMPLES = "scenes/shape"
"""The embedded data set whose images are the examples, and whose classes a page without a prompt starts with."""


@dataclass(frozen=True)
class DemoModels:
    """What answers.

    Attributes:
        learner: Names images, and is what adapters start from.
        segmenter: Finds a phrase.
        scanner: Looks for backdoor triggers; None if no prompt is one.
    """

    learner: Learner
    segmenter: Segmenter
    scanner: ImageScanner | None = None


def load_models(
    prompts: Sequence[str],
    backbone: Mapping[str, Any] | None = None,
    classnames: Sequence[str] | None = None,
) -> DemoModels:
    """Load saved prompts, and build zero-shot models for what none of them does.

    Args:
        prompts: At most one learner, one segmenter and one scanner (a ``dbom`` learner), in any order; each is a
            folder, that of its run, or its name on the Hub.
        backbone: What is to be built in another way than the prompts say; without prompts, the backbone itself.
        classnames: To choose from at the start; None for the learner's own, or those of :data:`EXAMPLES`.

    Raises:
        ConfigError: If two prompts are of one kind.
        CheckpointError: If one can't be read.
        BackboneError: If a backbone can't be built.
        DataError: If the classes are impossible.
    """
    changes = backbone or {}
    found: dict[str, tuple[str, Learner | Segmenter]] = {}

    for path in prompts:
        card, tensors = read(path)
        model: Learner | Segmenter
        if card.kind == "segmenter":
            kind, model = "segmenter", build_segmenter(path, card, tensors, changes)
        else:
            model = build_learner(path, card, tensors, changes)
            kind = "scanner" if isinstance(model, ImageScanner) else "learner"
        if kind in found:
            raise ConfigError([f"{found[kind][0]} and {path} are both a {kind}; name one."], "vlprompt demo")
        found[kind] = (path, model)

    models = {kind: model for kind, (_, model) in found.items()}
    scanner = models.get("scanner")
    assert scanner is None or isinstance(scanner, ImageScanner)
    learner = models.get("learner") or _zero_shot(models.values(), changes, scanner)
    assert isinstance(learner, Learner)
    if classnames:
        learner = for_classes(learner, classnames)

    segmenter = models.get("segmenter") or create_segmenter("clipseg", _with_decoder(learner.backbone))
    assert isinstance(segmenter, Segmenter)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for model in (learner, segmenter, *models.values()):
        model.to(model.backbone.device_or(device))
    return DemoModels(learner, segmenter, scanner)


def _zero_shot(
    models: Iterable[Learner | Segmenter], changes: Mapping[str, Any], scanner: ImageScanner | None
) -> Learner:
    """Return a zero-shot learner on the backbone that is there already, or else on the one that was asked for."""
    shared = next((model.backbone for model in models), None)
    tower = build_from(changes) if shared is None else shared
    if scanner is not None:
        return create_learner("zero_shot", tower, scanner.classnames)
    examples = load_dataset(EXAMPLES, "test")
    return create_learner("zero_shot", tower, examples.classnames, examples.templates)


def _with_decoder(backbone: Backbone) -> Backbone:
    """Return a backbone on which a phrase is found without training: this one, or the embedded one."""
    is_clipseg = backbone.fingerprint.get("architecture") == "clipseg"
    return backbone if is_clipseg or embedded("clipseg", backbone) is not None else create_backbone("tiny")
