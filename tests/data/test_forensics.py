"""Statistics of pixels at their own size: one length for every size, places as shares, what each group sees."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vlprompt.core.seeding import numpy_rng
from vlprompt.data.forensics import SIDE, VIEWS, examined, pixel_statistics, statistics_width
from vlprompt.data.triggers import create_trigger


def noise(height: int, width: int) -> np.ndarray:
    return numpy_rng(0, "forensics", height, width).integers(0, 256, (height, width, 3)).astype(np.uint8)


@pytest.mark.parametrize("size", [(1, 1), (5, 70), (16, 16), (32, 32), (33, 47), (64, 64)])
def test_images_of_every_size_have_as_many_finite_statistics(size: tuple[int, int]) -> None:
    statistics = pixel_statistics(noise(*size))
    assert statistics.shape == (statistics_width(),)
    assert statistics.dtype == np.float32
    assert np.isfinite(statistics).all()


def test_an_image_that_fits_is_looked_at_as_it_is() -> None:
    pixels = noise(40, SIDE)
    views = examined(Image.fromarray(pixels))
    assert views.shape == (VIEWS, 1 + statistics_width())
    assert views[0, 0] == 1
    assert np.array_equal(views[0, 1:], pixel_statistics(pixels))
    assert not views[1:].any()


def test_a_larger_image_shows_a_reduced_copy_and_its_corners_at_their_own_pixels() -> None:
    pixels = noise(100, 160)
    image = Image.fromarray(pixels)
    views = examined(image)
    assert (views[:, 0] == 1).all()
    reduced = np.asarray(image.resize((SIDE, 40), Image.Resampling.BICUBIC))
    assert np.array_equal(views[0, 1:], pixel_statistics(reduced))
    for number, corner in enumerate(
        (pixels[:64, :64], pixels[:64, 96:], pixels[36:, :64], pixels[36:, 96:]), 1
    ):
        assert np.array_equal(views[number, 1:], pixel_statistics(corner))


def test_a_small_patch_is_seen_in_its_corner_alone() -> None:
    pixels = np.full((150, 150, 3), 90, np.uint8) + noise(150, 150) // 32
    clean = examined(Image.fromarray(pixels))
    patched = examined(create_trigger("badnets", size=None)(Image.fromarray(pixels)))
    assert np.array_equal(clean[1:4], patched[1:4])
    assert np.abs(clean[4] - patched[4]).max() > 1


def test_few_levels_and_a_warp_are_told_from_clean_by_the_statistics_alone() -> None:
    rng = numpy_rng(0, "forensics", "separate")
    rows: dict[str, list[np.ndarray]] = {"clean": [], "bpp": [], "wanet": []}
    for _ in range(40):
        size = int(rng.integers(30, 60))
        coarse = Image.fromarray(rng.integers(0, 256, (160, 160, 3)).astype(np.uint8))
        image = coarse.resize((size, size), Image.Resampling.BOX)
        rows["clean"].append(pixel_statistics(np.asarray(image)))
        for name in ("bpp", "wanet"):
            rows[name].append(pixel_statistics(np.asarray(create_trigger(name, size=None)(image))))

    clean = np.stack(rows["clean"])
    for name in ("bpp", "wanet"):
        other = np.stack(rows[name])
        # Some statistic orders every clean image before every tampered one, or the other way.
        apart = (clean.max(0) < other.min(0)) | (clean.min(0) > other.max(0))
        assert apart.any(), name
