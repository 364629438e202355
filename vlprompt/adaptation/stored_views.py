"""Generated views that are made before the methods run: filling a store, and whether views look like their image."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tvf

from vlprompt.data import ImageDataset
from vlprompt.data.images import pixel_key
from vlprompt.data.loading import Loader
from vlprompt.diffusion import ViewSource, ViewStore
from vlprompt.learners import Learner

__all__ = ["classified_alike", "count_missing", "fill_store"]

log = logging.getLogger("vlprompt.run")

_PROGRESS_EVERY = 100  # images


def count_missing(store: ViewStore, data: ImageDataset, count: int) -> int:
    """Return how many of ``count`` views of every image are not in the store."""
    missing = 0
    with Loader(_KeyReader(data)) as loader:
        for key in loader.stream(range(len(data))):
            missing += len(store.missing(key, count))
    return missing


@dataclass(frozen=True)
class _KeyReader:
    """Reads images of a data set, and tells what their stored views are found by."""

    data: ImageDataset

    def __call__(self, index: int) -> str:
        """Return the key of one image."""
        return pixel_key(self.data[index][0])


def fill_store(source: ViewSource, data: ImageDataset, count: int) -> None:
    """Generate the views of a data set that its store lacks; every view is kept as soon as it is there.

    Args:
        source: With a store.
        data: The images.
        count: Views of each.

    Raises:
        DataError: If an image can't be read.
        CheckpointError: If a view can't be written.
    """
    # Image by image, so that a killed process loses little.
    for index in range(len(data)):
        image, _ = data[index]
        source.views([image], count)
        if (index + 1) % _PROGRESS_EVERY == 0:
            log.info("views of %s: %d of %d images", data.name, index + 1, len(data))


@torch.no_grad()
def classified_alike(
    learner: Learner,
    images: Sequence[Image.Image],
    variations: Sequence[Sequence[Image.Image]],
    blur: float = 0.0,
) -> float:
    """Return the share of variations, in [0, 1], that a classifier gives the class that it gives their image.

    Args:
        learner: The classifier.
        images: B RGB images.
        variations: Of each image, one or more.
        blur: Standard deviation, in pixels of the backbone's input, by which all images are blurred first. A generator
            that was trained with this backbone may have learned fine patterns that deceive it; a blur removes them.
    """
    learner.eval()
    backbone = learner.backbone
    matches: list[bool] = []
    for image, views in zip(images, variations, strict=True):
        pixels = torch.stack([backbone.preprocess(one) for one in (image, *views)])
        if blur:
            pixels = tvf.gaussian_blur(pixels, [5, 5], [blur, blur])

        classes = learner(pixels.to(backbone.device)).argmax(-1)
        matches += (classes[1:] == classes[0]).tolist()
    return sum(matches) / len(matches)
