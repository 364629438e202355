from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from torchvision.transforms import v2

from vlprompt.core.errors import DataError, UnknownNameError
from vlprompt.data import AUGMENTATIONS, Augmentation
from vlprompt.data.transforms import affine_of, crop_box

PREPROCESS = v2.Compose(
    [v2.Resize(32), v2.CenterCrop(32), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
)


def photo(width: int = 60, height: int = 40) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_none_is_the_backbones_preprocessing() -> None:
    views = [Augmentation().augment(photo(), PREPROCESS, seed=s, key="k", view=s) for s in range(3)]
    assert all(torch.equal(v, PREPROCESS(photo())) for v in views)
    assert Augmentation().describe(1, 5) == Augmentation().describe(2, 6)


@pytest.mark.parametrize("name", ["flip", "crop_flip"])
def test_a_view_depends_on_seed_key_and_number_alone(name: str) -> None:
    augmentation = Augmentation(name)
    keys = [f"key {i}" for i in range(8)]
    first = {k: augmentation.augment(photo(), PREPROCESS, 1, k, 0) for k in keys}
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    for key in reversed(keys):
        assert torch.equal(augmentation.augment(photo(), PREPROCESS, 1, key, 0), first[key])
    for seed, view in ((2, 0), (1, 1)):
        other = [augmentation.augment(photo(), PREPROCESS, seed, k, view) for k in keys]
        assert any(not torch.equal(o, f) for o, f in zip(other, first.values(), strict=True))
    assert len({augmentation.describe(s, v) for s in (1, 2) for v in (0, 1)}) == 4


def test_flip_flips_about_half() -> None:
    plain, flipped = PREPROCESS(photo()), PREPROCESS(photo()).flip(-1)
    count = 0
    for view in range(200):
        found = Augmentation("flip").augment(photo(), PREPROCESS, 1, "k", view)
        count += torch.equal(found, flipped)
        assert torch.equal(found, flipped) or torch.equal(found, plain)
    assert 70 <= count <= 130


@pytest.mark.parametrize("size", [(60, 40), (1, 1), (500, 3), (3, 500)])
def test_crops_have_the_backbones_size(size: tuple[int, int]) -> None:
    view = Augmentation("crop_flip").augment(photo(*size), PREPROCESS, 1, "k", 0)
    assert view.shape == (3, 32, 32)


def test_crop_keeps_within_scale_ratio_and_image() -> None:
    rng = np.random.default_rng(0)
    boxes = [crop_box(300, 400, (0.2, 0.6), rng.random) for _ in range(500)]
    for top, left, height, width in boxes:
        assert top >= 0 <= left
        assert top + height <= 300
        assert left + width <= 400
        assert 0.19 < height * width / 120_000 < 0.61
        assert 0.74 < width / height < 1.35
    areas = [h * w / 120_000 for _, _, h, w in boxes]
    assert 0.35 < float(np.mean(areas)) < 0.45


def test_full_scale_of_a_square_is_the_whole_image() -> None:
    square = photo(32, 32)
    found = Augmentation("crop_flip", scale=(1.0, 1.0)).augment(square, PREPROCESS, 1, "k", 0)
    assert any(torch.equal(found, p) for p in (PREPROCESS(square), PREPROCESS(square).flip(-1)))


def test_bad_augmentations() -> None:
    with pytest.raises(UnknownNameError, match="'crop_flip'"):
        Augmentation("crop_flop")
    with pytest.raises(DataError, match="0 < low <= high <= 1"):
        Augmentation("crop_flip", scale=(0.5, 0.1))
    assert [Augmentation(n).name for n in AUGMENTATIONS] == list(AUGMENTATIONS)
    for text in ("flip:0.5", "crop_flip:much", "crop_flip:"):
        with pytest.raises(DataError, match="only crop_flip takes a number"):
            Augmentation.parse(text)
    with pytest.raises(DataError, match="0 < low <= high <= 1"):
        Augmentation.parse("crop_flip:1.5")
    with pytest.raises(UnknownNameError, match="'crop_flip'"):
        Augmentation.parse("crop_flop:0.5")


def test_the_least_share_of_a_crop_can_be_said() -> None:
    assert Augmentation.parse("crop_flip:0.5") == Augmentation("crop_flip", (0.5, 1.0))
    assert Augmentation.parse("flip") == Augmentation("flip")
    views = {
        s: Augmentation.parse(s).describe(1, 0) for s in ("crop_flip", "crop_flip:0.08", "crop_flip:0.5")
    }
    assert views["crop_flip"] == views["crop_flip:0.08"] != views["crop_flip:0.5"]


# --- crops of tensors against crops by Pillow


@pytest.mark.parametrize("share", ["", ":0.5"])
def test_crops_of_tensors_are_those_of_pillow_but_for_rounding(share: str) -> None:
    """The same draws, the same boxes: the pixels differ by the rounding of the resizing."""
    for number in range(12):
        image = photo(97, 61 + number)
        tensor, pillow = (
            Augmentation.parse(name + share).augment(image, PREPROCESS, 3, f"k{number}", number)
            for name in ("crop_flip", "crop_flip_pil")
        )
        difference = (tensor - pillow).abs() * 255
        assert float(difference.max()) < 3.1
        assert float(difference.mean()) < 0.05


def test_several_views_of_one_image_are_the_single_ones() -> None:
    image = photo(90, 70)
    for name in ("none", "flip", "crop_flip", "crop_flip_pil"):
        augmentation = Augmentation(name)
        together = augmentation.augment_all(image, PREPROCESS, 1, "k", [4, 0, 2])
        single = [augmentation.augment(image, PREPROCESS, 1, "k", view) for view in (4, 0, 2)]
        assert torch.equal(together, torch.stack(single))


def test_boxes_and_flips_have_torchvisions_distribution() -> None:
    """Two samples of 2000: area, ratio, position (Kolmogorov-Smirnov), and the share of flips."""
    torch.manual_seed(0)
    image = photo(500, 375)
    augmentation = Augmentation("crop_flip")
    cuts = [augmentation._cut(image, augmentation._draws(1, f"k{i}", 0)) for i in range(2000)]
    ours = [(c.top, c.left, c.height, c.width) for c in cuts]
    reference = v2.RandomResizedCrop(224, scale=(0.08, 1.0))
    theirs = [tuple(reference.make_params([image]).values()) for _ in range(2000)]

    def figures(boxes: list[Any]) -> dict[str, np.ndarray]:
        top, left, height, width = np.asarray(boxes, float).T
        return {
            "area": height * width,
            "ratio": width / height,
            "vertical": top / np.maximum(375 - height, 1),
            "horizontal": left / np.maximum(500 - width, 1),
        }

    found, expected = figures(ours), figures(theirs)
    for name, values in found.items():
        assert ks_2samp(values, expected[name]).pvalue > 0.001, name
    assert abs(np.mean([c.flipped for c in cuts]) - 0.5) < 0.04  # 3.5 standard errors


def test_pixels_have_the_statistics_of_pillows_crops() -> None:
    image = photo(200, 150)
    means = {}
    for name in ("crop_flip", "crop_flip_pil"):
        views = Augmentation(name).augment_all(image, PREPROCESS, 1, "k", range(40))
        means[name] = (views.mean((0, 2, 3)), views.std((0, 2, 3)))
    for one, other in zip(*means.values(), strict=True):
        assert torch.allclose(one, other, atol=2e-3)


def test_a_preprocessing_that_is_more_than_scale_and_shift_is_left_to_pillow() -> None:
    class Grey:
        size = 32

        def __call__(self, image: Image.Image) -> torch.Tensor:
            return PREPROCESS(image.resize((32, 32))).mean(0, keepdim=True).expand(3, -1, -1)

    grey = Grey()
    assert affine_of(grey, (32, 32)) is None
    image = photo(60, 50)
    views = [Augmentation(n).augment(image, grey, 1, "k", 0) for n in ("crop_flip", "crop_flip_pil")]
    assert torch.equal(*views)
