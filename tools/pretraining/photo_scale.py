"""The factor on cosines that makes a model's probabilities fit photographs it was not trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from scipy.optimize import minimize_scalar
from torch import Tensor

from pretraining.photographs import Photographs
from vlprompt.backbones.lite0 import PREPROCESS
from vlprompt.backbones.openclip import wrap_open_clip
from vlprompt.backbones.tokenizer import wrap_tokenizer
from vlprompt.core.seeding import numpy_rng
from vlprompt.data.imagenet import synset_ids, synset_names

__all__ = ["best_scale", "calibrate"]

_IMAGES = 400
_LOGS = (0.0, float(np.log(100.0)))  # CLIP's bounds


def best_scale(cosines: Tensor, labels: Tensor) -> tuple[float, float]:
    """Return the factor on cosines (N, C) that minimises the mean negative log likelihood of labels (N,), and that."""

    def loss(log_scale: float) -> float:
        return float(F.cross_entropy(cosines.double() * float(np.exp(log_scale)), labels))

    minimum = minimize_scalar(loss, bounds=_LOGS, method="bounded")
    return float(np.exp(minimum.x)), float(minimum.fun)


@torch.no_grad()
def calibrate(model: CLIP, photos: Path, classes_kept_back: int, seed: int) -> dict[str, float]:
    """Return the best factor for "a photo of a {}." over all 1,000 names, and how the model does with it.

    The photographs are of classes that may be trained on, and are themselves kept back (``"val"``).

    Args:
        model: ``photo`` or ``photo-vit``.
        photos: See :mod:`pretraining.photographs`.
        classes_kept_back: See :class:`Photographs`.
        seed: See :class:`Photographs`.
    """
    import open_clip

    photographs = Photographs(photos, classes_kept_back, seed)
    pool = photographs.chosen("val")
    sample = [pool[i] for i in numpy_rng(seed, "calibration").permutation(len(pool))[:_IMAGES]]
    tokenizer = wrap_tokenizer(open_clip.SimpleTokenizer())
    backbone = wrap_open_clip(model, dict(PREPROCESS), tokenizer, {"architecture": "", "pretrained": None})
    text = backbone.class_weights(synset_names("imagenet"), ["a photo of a {}."])
    numbers = {name: i for i, name in enumerate(synset_ids("imagenet"))}
    images = [backbone.preprocess(photographs.read(*one)) for one in sample]
    features = torch.cat(
        [backbone.encode_image(torch.stack(images[i : i + 50])) for i in range(0, len(images), 50)]
    )
    labels = torch.tensor([numbers[name] for name, _ in sample])
    cosines = features @ text.T
    scale, loss = best_scale(cosines, labels)
    right = float((cosines.argmax(1) == labels).float().mean())

    return {"scale": scale, "nll": loss, "accuracy": right, "pictures": float(len(sample))}
