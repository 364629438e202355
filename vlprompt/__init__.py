"""vlprompt: adapt CLIP-family vision-language models by learning prompts.

Everything listed in ``__all__`` is the public contract. Importing the package is cheap; what a name needs is
imported when the name is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    __version__: str

    from vlprompt.adaptation import create_adapter, list_adapters
    from vlprompt.adaptation.stream import adapt_stream
    from vlprompt.backbones import Backbone, create_backbone, list_backbones
    from vlprompt.classification.evaluate import evaluate
    from vlprompt.classification.fit import RunResult, fit
    from vlprompt.classification.predict import predict
    from vlprompt.core.errors import VLPromptError
    from vlprompt.data import list_datasets, load_dataset, load_segmentation
    from vlprompt.detection import create_detector, list_detectors
    from vlprompt.experiments.tasks import run
    from vlprompt.generation import list_personalisers
    from vlprompt.learners import create_learner, list_learners
    from vlprompt.saved.hub import push
    from vlprompt.saved.prompts import Kind, save
    from vlprompt.security.scan import scan
    from vlprompt.segmentation import create_segmenter, list_segmenters
    from vlprompt.segmentation.evaluate import evaluate_segmenter
    from vlprompt.segmentation.fit import fit_segmenter

_HOME = {
    "RunResult": "vlprompt.classification.fit",
    "VLPromptError": "vlprompt.core.errors",
    "adapt_stream": "vlprompt.adaptation.stream",
    "create_adapter": "vlprompt.adaptation",
    "create_backbone": "vlprompt.backbones",
    "create_detector": "vlprompt.detection",
    "create_learner": "vlprompt.learners",
    "create_segmenter": "vlprompt.segmentation",
    "evaluate": "vlprompt.classification.evaluate",
    "evaluate_segmenter": "vlprompt.segmentation.evaluate",
    "fit": "vlprompt.classification.fit",
    "fit_segmenter": "vlprompt.segmentation.fit",
    "list_adapters": "vlprompt.adaptation",
    "list_backbones": "vlprompt.backbones",
    "list_datasets": "vlprompt.data",
    "list_detectors": "vlprompt.detection",
    "list_learners": "vlprompt.learners",
    "list_personalisers": "vlprompt.generation",
    "list_segmenters": "vlprompt.segmentation",
    "load_dataset": "vlprompt.data",
    "load_segmentation": "vlprompt.data",
    "predict": "vlprompt.classification.predict",
    "push": "vlprompt.saved.hub",
    "run": "vlprompt.experiments.tasks",
    "save": "vlprompt.saved.prompts",
    "scan": "vlprompt.security.scan",
}

__all__ = [
    "RunResult",
    "VLPromptError",
    "adapt_stream",
    "create_adapter",
    "create_backbone",
    "create_detector",
    "create_learner",
    "create_segmenter",
    "evaluate",
    "evaluate_segmenter",
    "export",
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
    "load_dataset",
    "load_segmentation",
    "predict",
    "push",
    "run",
    "save",
    "scan",
]


def load(
    path: str | Path, backbone: Backbone | Mapping[str, Any] | None = None, kind: Kind | None = None
) -> Any:
    """Read what :func:`vlprompt.save` wrote: a learner, or a segmentation model. No code in the files can run.

    Args:
        path: The folder, or that of the cell or run which saved it, if it saved no other; ``"user/name"`` or
            ``"user/name@revision"`` fetches what was pushed to the Hub.
        backbone: The backbone it was trained on; None builds what the file says. A mapping builds that with other
            arguments of :func:`create_backbone`, such as ``{"pretrained": PATH}`` where weights have moved.
        kind: What it has to be; None takes either.

    Raises:
        CheckpointError: If a file is missing, damaged or hostile, of another kind, or the backbone is another
            one; names the difference.
        BackboneError: If the backbone's weights can't be fetched.
    """
    from vlprompt.saved.prompts import build_learner, check_kind, read

    card, tensors = read(path)
    if kind is not None:
        check_kind(path, card, kind)
    if card.kind == "learner":
        return build_learner(path, card, tensors, backbone)

    from vlprompt.segmentation.evaluate import build_segmenter  # those who classify need none of it

    return build_segmenter(path, card, tensors, backbone)


def export(model: Any, path: str | Path, *, phrases: Sequence[str] | None = None, int8: bool = False) -> Path:
    """Write a learner or a segmenter as one file that runs without this library, and check that it gives the same.

    Args:
        model: A learner, or a segmentation model.
        path: ``*.onnx``, or ``*.pt2`` for a program of ``torch.export``.
        phrases: What to segment; of a segmentation model alone.
        int8: Weights of matrix products in eight bits; of a learner in an ``.onnx`` file alone.

    Raises:
        ExportError: See :func:`vlprompt.saved.export.export`.
        DataError: If ``int8`` is neither true nor false.
    """
    from vlprompt.core.errors import ConfigError
    from vlprompt.core.options import check_switches
    from vlprompt.learners import Learner
    from vlprompt.saved.export import export as export_learner
    from vlprompt.segmentation.export import export_segmenter

    check_switches(int8=int8)
    if isinstance(model, Learner):
        if phrases is not None:
            raise ConfigError(
                ["phrases: a classifier has class names; learner.with_classes(names) changes them."]
            )
        return export_learner(model, path, int8=int8)

    if int8:
        raise ConfigError(["int8: segmentation models are exported in float32 alone."])
    if phrases is None:
        raise ConfigError(["phrases: a segmentation model is exported for a list of phrases; say which."])
    return export_segmenter(model, path, phrases)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("vlprompt.core.version").package_version()
    if name not in _HOME:
        raise AttributeError(f"module 'vlprompt' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), "__version__", *__all__])
