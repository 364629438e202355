"""What ``photo`` names of photographs: of classes whose names ImageNet's list has, and of the others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from benchmarks import BENCHMARKS
from benchmarks.text import imagenet_names
from vlprompt.backbones import Backbone, create_backbone
from vlprompt.classification.evaluate import predict_logits
from vlprompt.core.names import clean_classname
from vlprompt.core.seeding import numpy_rng
from vlprompt.data import FeatureCache, ImageDataset, load_dataset
from vlprompt.learners import create_learner

__all__ = ["bench_lexicon", "is_inside"]

_IMAGENET = 1000


@BENCHMARKS.register(
    "lexicon", summary="zero-shot accuracy on a folder, by whether ImageNet's names have a class's name"
)
def bench_lexicon(
    *,
    folder: str,
    backbone: str = "photo",
    split: str = "test",
    draws: Annotated[int, Field(ge=100)] = 2000,
) -> dict[str, Any]:
    """Classify every image among all class names, with the data set's sentences.

    A class is ``inside`` if its name occurs in one of ImageNet's 1,000 names ("binocular" in "binoculars", but "emu" in
    "lemur" too), and ``outside`` otherwise. ``accuracy`` is the mean over the classes of a group of the share of their
    images that are named right, with the 95 % interval of the test set: ``draws`` times as many images are drawn from
    each class anew.

    Args:
        folder: Of photographs: ``<split>/<class name>/*.jpg`` or ``<class name>/*.jpg``.
        backbone: ``photo`` or ``photo-vit``.
        split: Which part is classified.
        draws: Repetitions of the bootstrap.
    """
    tower = create_backbone(backbone)
    data = load_dataset(f"folder:{Path(folder)}", split)
    right = _right_by_class(tower, data)
    names = imagenet_names(_IMAGENET)
    inside = [is_inside(name, names) for name in data.classnames]

    groups = {
        "all": right,
        "inside": {c: values for c, values in right.items() if inside[c]},
        "outside": {c: values for c, values in right.items() if not inside[c]},
    }
    figures = {group: _figures(members, draws) for group, members in groups.items() if members}
    unplaced = tower.unplaced_words(data.classnames)
    return {"backbone": backbone, "images": len(data), **figures, "unplaced": unplaced}


def is_inside(name: str, names: Sequence[str]) -> bool:
    """Return whether a name occurs in one of some names, letter by letter, whatever their case."""
    letters = clean_classname(name).casefold()
    return any(letters in clean_classname(other).casefold() for other in names)


def _right_by_class(tower: Backbone, data: ImageDataset) -> dict[int, np.ndarray]:
    """Return class to whether each of its images is named right; classes without images are left out."""
    learner = create_learner("zero_shot", tower, data.classnames, data.templates)
    logits, labels = predict_logits(learner, data, cache=FeatureCache(prefix_gib=0))
    right = (logits.argmax(1) == labels).numpy()
    truth = labels.numpy()
    return {int(label): right[truth == label] for label in np.unique(truth)}


def _figures(right: dict[int, np.ndarray], draws: int) -> dict[str, Any]:
    """Return the mean over classes, its interval, and how many classes are never named."""
    rng = numpy_rng(0, "bootstrap of a test set")
    means = np.array([values.mean() for values in right.values()])
    drawn = np.array([rng.choice(values, (draws, len(values))).mean(1) for values in right.values()]).mean(0)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return {
        "classes": len(means),
        "accuracy": float(means.mean()),
        "interval": [float(low), float(high)],
        "classes_never_named": int((means == 0).sum()),
    }
