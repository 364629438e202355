"""vlprompt: adapt CLIP-family vision-language models by learning prompts.

Everything listed in ``__all__`` is the public contract. Importing the package is cheap; what a name needs is
imported when the name is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlprompt.adaptation import create_adapter, list_adapters
    from vlprompt.artefacts import load, save
    from vlprompt.backbones import create_backbone, list_backbones
    from vlprompt.config import load_config
    from vlprompt.data import list_datasets, load_dataset
    from vlprompt.data.segmentation import load_segmentation
    from vlprompt.detection import create_detector, list_detectors
    from vlprompt.errors import VLPromptError
    from vlprompt.evaluation.evaluate import evaluate
    from vlprompt.inference import predict
    from vlprompt.learners import create_learner, list_learners
    from vlprompt.personalisation import list_personalisers
    from vlprompt.security.scan import scan
    from vlprompt.segmentation import create_segmenter, list_segmenters
    from vlprompt.segmentation.tuning.evaluate import evaluate_segmenter
    from vlprompt.segmentation.tuning.fit import fit_segmenter
    from vlprompt.training.fit import RunResult, fit
    from vlprompt.training.run import run

_HOME = {
    "RunResult": "vlprompt.training.fit",
    "VLPromptError": "vlprompt.errors",
    "create_adapter": "vlprompt.adaptation",
    "create_backbone": "vlprompt.backbones",
    "create_detector": "vlprompt.detection",
    "create_learner": "vlprompt.learners",
    "create_segmenter": "vlprompt.segmentation",
    "evaluate": "vlprompt.evaluation.evaluate",
    "evaluate_segmenter": "vlprompt.segmentation.tuning.evaluate",
    "fit": "vlprompt.training.fit",
    "fit_segmenter": "vlprompt.segmentation.tuning.fit",
    "list_adapters": "vlprompt.adaptation",
    "list_backbones": "vlprompt.backbones",
    "list_datasets": "vlprompt.data",
    "list_detectors": "vlprompt.detection",
    "list_learners": "vlprompt.learners",
    "list_personalisers": "vlprompt.personalisation",
    "list_segmenters": "vlprompt.segmentation",
    "load": "vlprompt.artefacts",
    "load_config": "vlprompt.config",
    "load_dataset": "vlprompt.data",
    "load_segmentation": "vlprompt.data.segmentation",
    "predict": "vlprompt.inference",
    "run": "vlprompt.training.run",
    "save": "vlprompt.artefacts",
    "scan": "vlprompt.security.scan",
}

__all__ = [
    "RunResult",
    "VLPromptError",
    "create_adapter",
    "create_backbone",
    "create_detector",
    "create_learner",
    "create_segmenter",
    "evaluate",
    "evaluate_segmenter",
    "fit",
    "fit_segmenter",
    "list_adapters",
    "list_backbones",
    "list_datasets",
    "list_detectors",
    "list_learners",
    "list_personalisers",
    "list_segmenters",
    "load",
    "load_config",
    "load_dataset",
    "load_segmentation",
    "predict",
    "run",
    "save",
    "scan",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'vlprompt' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
