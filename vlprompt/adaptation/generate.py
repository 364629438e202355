"""Generating views ahead of a run, as a stage of its own, and what they are worth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tvf

from vlprompt.adaptation.config import AdaptConfig
from vlprompt.adaptation.experiment import draw_stream, view_source
from vlprompt.backbones import create_backbone
from vlprompt.core.errors import ConfigError
from vlprompt.data import ImageDataset
from vlprompt.data.images import pixel_key
from vlprompt.diffusion import ViewStore
from vlprompt.learners import Learner, create_learner

__all__ = ["Generated", "generate_views", "named_alike"]

_BLUR = 0.8
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Generated:
    """What a generation left behind.

    Attributes:
        store: Where the views lie.
        alike: By data set the share of views, in [0, 1], that the configuration's backbone names like the image
            they were made of; empty unless it was asked for.
        alike_blurred: The same of blurred views and images.
    """

    store: ViewStore
    alike: dict[str, float]
    alike_blurred: dict[str, float]


def generate_views(config: AdaptConfig, progress: Progress | None = None, check: int = 0) -> Generated:
    """Fill the store with the generated views that a run of this configuration needs; goes on where it stopped.

    Args:
        config: See :meth:`AdaptConfig.read`.
        progress: Called with (what, done, n).
        check: Images per data set and seed whose views are named, to see what they are worth.

    Raises:
        ConfigError: If the configuration names no store, or wants no generated views.
        BackboneError: If the pipeline can't be had.
        CheckpointError: If the store is another generator's.
    """
    if config.diffusion is None or config.diffusion.store is None or not config.generated:
        problem = (
            "diffusion.store: generating ahead needs a store, and an adapter that wants generated views."
        )
        raise ConfigError([problem], config.name)
    source = view_source(config, generate=True)
    assert source.store is not None
    streams: dict[str, list[ImageDataset]] = {}
    for name in config.data.names:
        for seed in config.seeds:
            data = draw_stream(config, name, seed)
            streams.setdefault(name, []).append(data)
            for i in range(len(data)):
                image = data[i][0]
                if source.store.missing(pixel_key(image), config.generated):
                    source.views([image], config.generated)
                if progress is not None:
                    progress(f"{name}, seed {seed}", i + 1, len(data))
    shares = {n: _alike(config, source.store, parts, check) for n, parts in streams.items()} if check else {}
    plain, blurred = ({n: pair[i] for n, pair in shares.items()} for i in range(2))
    return Generated(source.store, plain, blurred)


def _alike(
    config: AdaptConfig, store: ViewStore, parts: Sequence[ImageDataset], check: int
) -> tuple[float, float]:
    backbone = create_backbone(config.backbone.name, **config.backbone.arguments())
    learner = create_learner("zero_shot", backbone, parts[0].classnames, parts[0].templates)
    images = [data[i][0] for data in parts for i in range(min(check, len(data)))]
    views = [store.get(pixel_key(i), config.generated) for i in images]
    return named_alike(learner, images, views), named_alike(learner, images, views, _BLUR)


@torch.no_grad()
def named_alike(
    learner: Learner,
    images: Sequence[Image.Image],
    variations: Sequence[Sequence[Image.Image]],
    blur: float = 0.0,
) -> float:
    """Return the share of variations, in [0, 1], that a classifier names like the image they were made of.

    Args:
        learner: The classifier.
        images: B RGB images.
        variations: Of each, one or more.
        blur: Blur all of them, by so many of the backbone's pixels (standard deviation): a generator that was trained
            with this backbone's eyes may have learned fine patterns that deceive it, which do not outlive a blur.
    """
    learner.eval()
    preprocess, shares = learner.backbone.preprocess, []
    for image, made in zip(images, variations, strict=True):
        pixels = torch.stack([preprocess(i) for i in (image, *made)])
        if blur:
            pixels = tvf.gaussian_blur(pixels, [5, 5], [blur, blur])
        named = learner(pixels).argmax(-1)
        shares += (named[1:] == named[0]).tolist()
    return sum(shares) / len(shares)
