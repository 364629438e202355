"""Views cut from one decoded tensor, against Pillow one by one; streams that loading workers read ahead."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vlprompt.adaptation import create_adapter
from vlprompt.adaptation.stream import adapt_dataset
from vlprompt.adaptation.views import ViewPlan, open_images
from vlprompt.backbones import Backbone, create_backbone
from vlprompt.data import ImageDataset, load_dataset


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return create_backbone("tiny")


def photo(width: int = 90, height: int = 70) -> Image.Image:
    coarse = np.random.default_rng(0).integers(0, 256, (7, 9, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("share", ["", ":0.5"])
def test_views_of_tensors_are_those_of_pillow_but_for_rounding(share: str, backbone: Backbone) -> None:
    opened = open_images(photo(), backbone)[0]
    tensor, pillow = (
        ViewPlan(24, kind + share).make(opened, backbone) for kind in ("crop_flip", "crop_flip_pil")
    )
    assert torch.equal(tensor[0], pillow[0])  # the image itself

    step = 1 / (255 * min(backbone.fingerprint["preprocess"]["std"]))  # one of 255, in normalised pixels
    difference = (tensor - pillow).abs() / step
    assert float(difference.max()) < 3.1
    assert float(difference.mean()) < 0.1


@pytest.mark.parametrize("kind", ["crop_flip", "crop_flip_pil", "augmix"])
def test_a_plan_of_one_view_begins_one_of_many(kind: str, backbone: Backbone) -> None:
    opened = open_images(photo(), backbone)[0]
    many = ViewPlan(12, kind, seed=2).make(opened, backbone)
    for count in (1, 2, 7):
        assert torch.equal(ViewPlan(count, kind, seed=2).make(opened, backbone), many[:count])


@pytest.fixture
def data(tmp_path: Path) -> ImageDataset:
    for number in range(10):
        folder = tmp_path / "photos" / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        photo(60 + number, 50).save(folder / f"{number}.png")
    return load_dataset(f"folder:{tmp_path / 'photos'}", "all")


def test_a_stream_is_the_same_for_any_number_of_workers_and_behind_a_kill(
    data: ImageDataset, backbone: Backbone, tmp_path: Path
) -> None:
    def adapt(workers: int, folder: Path | None = None) -> dict[str, torch.Tensor]:
        adapters = {name: create_adapter(name, backbone, data.classnames, views=6) for name in ("mta", "tpt")}
        results = adapt_dataset(adapters, data, folder=folder, batch_size=3, workers=workers)
        return {label: predictions.probs for label, predictions in results.items()}

    alone = adapt(0)
    images = [data[i][0] for i in range(len(data))]
    by_hand = create_adapter("mta", backbone, data.classnames, views=6).predict(images).probs
    torch.testing.assert_close(alone["mta"], by_hand)

    adapt(2, tmp_path / "stream")
    batches = sorted((tmp_path / "stream").glob("*.safetensors"))
    batches[1].unlink()  # as if it had never been written: in the middle, and at the end
    batches[-1].unlink()
    for found in (adapt(1), adapt(4), adapt(2, tmp_path / "stream")):
        assert all(torch.equal(probs, alone[label]) for label, probs in found.items())
