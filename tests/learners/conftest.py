"""Fixtures of the tests of mask tuning; a file's own ones of the same name come first."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor

from tests.learners.masking import LABELS, TOWERS
from vlprompt import load_dataset
from vlprompt.backbones import Backbone
from vlprompt.data import ImageDataset


@pytest.fixture(scope="module", params=list(TOWERS))
def tower(request: pytest.FixtureRequest, make_backbone: Callable[..., Backbone]) -> Backbone:
    return make_backbone(**TOWERS[request.param])


@pytest.fixture(scope="module")
def digits() -> ImageDataset:
    return load_dataset("digits", "train", shots=2, seed=1)


@pytest.fixture
def batch(images: Tensor) -> dict[str, Tensor]:
    return {"image": images, "label": LABELS}
