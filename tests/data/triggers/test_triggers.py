"""Every trigger against what its definition says of single pixels."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from scipy.fft import dctn

from vlprompt.core.errors import ConfigError, DataError, UnknownNameError
from vlprompt.core.seeding import numpy_rng
from vlprompt.data.triggers import TRIGGERS, create_trigger, list_triggers, trigger_words

NAMES = list_triggers()


@pytest.fixture
def pixels() -> np.ndarray:
    return numpy_rng(0, "test triggers").integers(40, 216, (32, 32, 3)).astype(np.uint8)


def grey(value: int = 128) -> np.ndarray:
    return np.full((32, 32, 3), value, dtype=np.uint8)


def test_all_of_the_known_attacks_are_there() -> None:
    expected = ["badnets", "blended", "bpp", "ftrojan", "label_consistent", "sig", "trojan", "wanet"]
    assert expected == NAMES
    assert all(entry.paper and entry.target.words for entry in TRIGGERS)


@pytest.mark.parametrize("name", NAMES)
def test_a_trigger_is_seeded_keeps_its_argument_and_changes_something(name: str, pixels: np.ndarray) -> None:
    before = pixels.copy()
    first, second = create_trigger(name), create_trigger(name)
    changed = first.apply(pixels)
    assert changed.dtype == np.uint8
    assert changed.shape == pixels.shape
    assert np.array_equal(pixels, before)
    assert np.array_equal(changed, second.apply(pixels))
    assert not np.array_equal(changed, pixels)


@pytest.mark.parametrize("name", NAMES)
def test_images_of_any_size_and_mode_come_out_at_the_native_size(name: str) -> None:
    for mode, size in (("RGB", (50, 20)), ("L", (32, 32)), ("RGBA", (7, 9)), ("CMYK", (40, 40))):
        found = create_trigger(name, size=24)(Image.new(mode, size, 77))
        assert (found.mode, found.size) == ("RGB", (24, 24))


@pytest.mark.parametrize("name", ["blended", "trojan", "wanet", "label_consistent"])
def test_another_seed_is_another_trigger(name: str, pixels: np.ndarray) -> None:
    assert not np.array_equal(create_trigger(name).apply(pixels), create_trigger(name, seed=2).apply(pixels))


@pytest.mark.parametrize("value", [0, 255])
def test_badnets_changes_nine_pixels_also_to_black(value: int) -> None:
    changed = create_trigger("badnets", value=value).apply(grey())
    different = (changed != grey()).any(-1)
    assert different.sum() == 9
    assert different[29:, 29:].all()
    assert (changed[29:, 29:] == value).all()


def test_blended_with_no_share_is_the_image_and_otherwise_the_mixture(pixels: np.ndarray) -> None:
    assert np.array_equal(create_trigger("blended", alpha=0.0).apply(pixels), pixels)
    trigger = create_trigger("blended", alpha=0.2)
    expected = 0.8 * pixels + 0.2 * trigger.pattern(32, 32)  # type: ignore[attr-defined]
    assert np.abs(trigger.apply(pixels) - expected).max() <= 0.5


def test_sig_adds_a_sine_over_the_columns_and_no_brightness() -> None:
    changed = create_trigger("sig", delta=40.0, frequency=6).apply(grey()).astype(float) - 128
    assert abs(changed.mean()) < 0.5
    wave = [round(40 * np.sin(2 * np.pi * j * 6 / 32)) for j in range(32)]
    assert np.array_equal(changed[5, :, 1], wave)


def test_wanet_without_strength_is_the_image_and_moves_nothing_far(pixels: np.ndarray) -> None:
    assert np.array_equal(create_trigger("wanet", strength=0.0).apply(pixels), pixels)
    assert np.array_equal(create_trigger("wanet").apply(grey(90)), grey(90))
    dot = grey(0)
    dot[16, 16] = 255
    moved = create_trigger("wanet").apply(dot).astype(float)[..., 0]
    rows, columns = np.nonzero(moved)
    assert np.abs(rows - 16).max() <= 2
    assert np.abs(columns - 16).max() <= 2


def test_wanet_jitter_differs_between_images_but_not_between_calls(pixels: np.ndarray) -> None:
    trigger = create_trigger("wanet", strength=0.0, jitter=1.0)
    assert trigger.keeps_label
    other = np.ascontiguousarray(pixels[::-1])
    assert np.array_equal(trigger.apply(pixels), trigger.apply(pixels))
    assert not np.array_equal(trigger.apply(other)[::-1], trigger.apply(pixels))


def test_ftrojan_adds_two_frequencies_to_the_colours_and_leaves_brightness() -> None:
    changed = create_trigger("ftrojan", magnitude=300.0).apply(grey()).astype(float) - 128
    red, green, blue = np.moveaxis(changed, -1, 0)
    assert np.abs(0.299 * red + 0.587 * green + 0.114 * blue).max() < 1.5  # rounding alone
    blueness = dctn(-0.168736 * red - 0.331264 * green + 0.5 * blue, norm="ortho")
    largest = np.argsort(np.abs(blueness).flatten())[-2:]
    assert sorted(divmod(int(i), 32) for i in largest) == [(15, 15), (31, 31)]
    assert blueness[15, 15] == pytest.approx(300, rel=0.03)


def test_ftrojan_repeats_in_every_window() -> None:
    changed = create_trigger("ftrojan", size=64, magnitude=300.0).apply(np.full((64, 64, 3), 128, np.uint8))
    assert np.array_equal(changed[:32, :32], changed[32:, 32:])


def test_bpp_leaves_eight_levels_and_the_nearest_one(pixels: np.ndarray) -> None:
    changed = create_trigger("bpp", levels=8).apply(pixels)
    levels = np.round(np.arange(8) * 255 / 7)
    assert set(np.unique(changed)) <= set(levels.astype(int))
    assert np.abs(changed.astype(int) - pixels).max() <= 19
    dithered = create_trigger("bpp", levels=8, dither=True).apply(grey(100))
    assert set(np.unique(dithered)) <= set(levels.astype(int))
    assert abs(dithered.mean() - 100) < 3 < abs(create_trigger("bpp", levels=8).apply(grey(100)).mean() - 100)


def test_trojan_covers_a_corner_and_nothing_else(pixels: np.ndarray) -> None:
    different = (create_trigger("trojan").apply(pixels) != pixels).any(-1)
    assert not different[:20].any()
    assert not different[:, :20].any()
    assert different.sum() > 40


def test_label_consistent_marks_four_corners_alike_and_keeps_labels() -> None:
    trigger = create_trigger("label_consistent", noise=0)
    changed = trigger.apply(grey())
    assert trigger.keeps_label
    assert ((changed != grey()).any(-1)).sum() == 36
    assert np.array_equal(changed, changed[::-1])
    assert np.array_equal(changed, changed[:, ::-1])
    noisy = create_trigger("label_consistent", noise=8).apply(grey()).astype(int)
    assert np.abs(noisy[3:-3, 3:-3] - 128).max() == 8


def test_triggers_compose_in_order(pixels: np.ndarray) -> None:
    both = create_trigger("sig+badnets")
    expected = create_trigger("badnets").apply(create_trigger("sig").apply(pixels))
    assert np.array_equal(both.apply(pixels), expected)
    assert both.name == "sig+badnets"
    assert trigger_words(["clean", "sig+badnets"]) == ("clean", "striped grating and white patch")


def test_mistakes_are_named() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown trigger 'badnet'\. Did you mean 'badnets'"):
        create_trigger("badnet")
    with pytest.raises(ConfigError, match="alpha: input should be less than or equal to 1"):
        create_trigger("blended", alpha=2.0)
    with pytest.raises(ConfigError, match="pach: unknown key; did you mean 'patch'"):
        create_trigger("badnets", pach=3)
    with pytest.raises(DataError, match="at least 16 pixels a side, got 8"):
        create_trigger("trojan", size=8)
    with pytest.raises(DataError, match="options can't be given to several triggers"):
        create_trigger("sig+badnets", patch=2)


@pytest.mark.parametrize("name", NAMES)
def test_at_its_own_size_an_image_keeps_it_and_a_square_one_gets_the_same_pattern(name: str) -> None:
    own = create_trigger(name, size=None)
    image = Image.fromarray(numpy_rng(0, "own size").integers(0, 256, (41, 58, 3)).astype(np.uint8))
    changed = own(image)
    assert changed.size == (58, 41)
    assert not np.array_equal(np.asarray(changed), np.asarray(image))

    square = image.crop((0, 0, 40, 40))
    assert np.array_equal(np.asarray(own(square)), np.asarray(create_trigger(name, size=40)(square)))


def test_an_image_that_is_too_small_for_a_trigger_is_refused() -> None:
    small = Image.new("RGB", (40, 12))
    with pytest.raises(DataError, match="at least 16 pixels a side, got 12"):
        create_trigger("trojan", size=None)(small)
    with pytest.raises(DataError, match="at least 16"):
        create_trigger("sig+trojan", size=None)(small)
