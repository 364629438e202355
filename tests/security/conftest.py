"""A scanner that knows what to look for, and images of every kind that can be wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vlprompt.backbones import Backbone
from vlprompt.core.seeding import numpy_rng
from vlprompt.learners._scanning import ImageScanner
from vlprompt.metrics.verdicts import Verdicts


class CornerScanner(ImageScanner):
    """Suspects images whose bottom right corner is bright; a real scanner but for how it judges."""

    method = "corner"
    triggers = ("clean", "badnets")
    classnames = ("dark", "bright")

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.batches: list[int] = []

    @property
    def threshold(self) -> float:
        return 0.9

    def embed_images(self, images: Tensor) -> Tensor:
        self.batches.append(len(images))
        return images[:, :, -1, -1]

    def judge(self, rows: Tensor) -> Verdicts:
        score = torch.sigmoid(2 * rows.mean(1))
        both = torch.stack([1 - score, score], dim=1)
        return Verdicts(score, both, both)


@pytest.fixture
def corner(backbone: Backbone) -> CornerScanner:
    return CornerScanner(backbone)


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """A folder of 23 images, those with a number divisible by 5 marked, at two depths."""
    root = tmp_path / "images"
    rng = numpy_rng(0, "test scan")
    for i in range(23):
        pixels = rng.integers(0, 120, (40, 40, 3)).astype(np.uint8)
        if i % 5 == 0:
            pixels[30:, 30:] = 255
        folder = root / ("a" if i % 2 else "b/deep")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    return root
