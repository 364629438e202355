"""Overlap and boundary distance against loops over pixels, scipy and segmentation_models_pytorch."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import directed_hausdorff

from vlprompt.core.errors import DataError
from vlprompt.metrics.masks import hausdorff, mean_iou_of_maps, score_pair, summarise_pairs

Mask = np.ndarray


def blobs(seed: int, shape: tuple[int, int] = (17, 23)) -> tuple[Mask, Mask]:
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    found = []
    for _ in range(2):
        y, x, r = rng.uniform(4, 12), rng.uniform(5, 18), rng.uniform(2, 6)
        found.append((rows - y) ** 2 + (columns - x) ** 2 < r**2)
    return found[0], found[1]


def boundary(mask: Mask) -> list[tuple[int, int]]:
    """Pixels with one of four neighbours outside of the mask or of the image, by looking at each."""
    height, width = mask.shape
    found = []
    for y, x in itertools.product(range(height), range(width)):
        near = [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
        if mask[y, x] and any(not (0 <= a < height and 0 <= b < width) or not mask[a, b] for a, b in near):
            found.append((y, x))
    return found


def slow_hausdorff(first: Mask, second: Mask, share: float) -> float:
    a, b = boundary(first), boundary(second)

    def way(start: list[tuple[int, int]], goal: list[tuple[int, int]]) -> float:
        return float(np.percentile([min(math.dist(p, q) for q in goal) for p in start], share))

    return max(way(a, b), way(b, a))


@pytest.mark.parametrize("seed", range(8))
def test_scores_of_a_pair_by_counting_pixels(seed: int) -> None:
    ours, true = blobs(seed)
    score = score_pair(ours, true.astype(np.uint8))
    both = sum(bool(a and b) for a, b in zip(ours.ravel(), true.ravel(), strict=True))
    either = sum(bool(a or b) for a, b in zip(ours.ravel(), true.ravel(), strict=True))
    assert score.dice == pytest.approx(2 * both / (both + either))
    assert score.iou == pytest.approx(both / either)
    assert score.everything == pytest.approx(2 * true.sum() / (true.sum() + true.size))
    assert score.hd95 == pytest.approx(slow_hausdorff(ours, true, 95))


@pytest.mark.parametrize("seed", range(4))
def test_the_largest_distance_is_scipys(seed: int) -> None:
    ours, true = blobs(seed)
    a, b = boundary(ours), boundary(true)
    theirs = max(directed_hausdorff(a, b)[0], directed_hausdorff(b, a)[0])
    assert hausdorff(ours, true, 100) == pytest.approx(theirs)


def test_empty_masks() -> None:
    none, some = np.zeros((3, 4), bool), np.zeros((3, 4), bool)
    some[1, 1] = True
    both = score_pair(none, none.astype(np.uint8))
    assert (both.dice, both.iou, both.hd95, both.everything, both.empty) == (1, 1, 0, 0, True)
    missed, false = score_pair(none, some.astype(np.uint8)), score_pair(some, none.astype(np.uint8))
    assert (missed.dice, missed.iou, missed.hd95) == (0, 0, 5)  # the diagonal of 3 x 4
    assert (false.dice, false.iou, false.hd95, false.empty) == (0, 0, 5, True)


def test_pixels_that_do_not_count_change_nothing() -> None:
    ours, true = blobs(3)
    mask = true.astype(np.uint8)
    score = score_pair(ours, mask)
    wide = np.pad(mask, ((0, 0), (0, 6)), constant_values=255)
    for filled in (True, False):
        other = score_pair(np.pad(ours, ((0, 0), (0, 6)), constant_values=filled), wide)
        assert (other.dice, other.iou, other.everything) == (score.dice, score.iou, score.everything)
        assert other.hd95 == score.hd95


def test_bad_masks_are_refused() -> None:
    with pytest.raises(DataError, match=r"a: a mask holds 0, 1 and 255 only, got \[2\]"):
        score_pair(np.zeros((2, 2), bool), np.full((2, 2), 2, np.uint8), "a")
    with pytest.raises(DataError, match=r"the prediction is \(2, 2\), the mask \(2, 3\)"):
        score_pair(np.zeros((2, 2), bool), np.zeros((2, 3), np.uint8))
    with pytest.raises(DataError, match="no pairs"):
        summarise_pairs([], [])


def test_means_are_smps_reductions() -> None:
    metrics = pytest.importorskip("segmentation_models_pytorch").metrics
    pairs = [blobs(seed) for seed in range(9)]
    pairs[4] = (pairs[4][0] & False, pairs[4][1])
    scores = [score_pair(a, b.astype(np.uint8), label=i % 3) for i, (a, b) in enumerate(pairs)]
    found = summarise_pairs(scores, ["x", "y", "z"])
    ours, true = (torch.tensor(np.stack([p[k] for p in pairs])).long()[:, None] for k in (0, 1))
    stats = metrics.get_stats(ours, true, mode="binary")
    assert found["dice"] == pytest.approx(float(metrics.f1_score(*stats, reduction="micro-imagewise")))
    assert found["iou"] == pytest.approx(float(metrics.iou_score(*stats, reduction="micro-imagewise")))
    pooled = [
        float(metrics.iou_score(*[s[label::3] for s in stats], reduction="micro")) for label in range(3)
    ]
    assert found["iou_dataset"] == pytest.approx(np.mean(pooled))
    by_class = [
        float(metrics.f1_score(*[s[c::3] for s in stats], reduction="micro-imagewise")) for c in range(3)
    ]
    assert found["macro_dice"] == pytest.approx(np.mean(by_class))
    assert found["class/y/dice"] == pytest.approx(by_class[1])


def test_empty_masks_are_reported_apart() -> None:
    none = np.zeros((4, 4), bool)
    some = ~none
    scores = [
        score_pair(a, b.astype(np.uint8)) for a, b in ((none, none), (some, none), (some, some), (none, some))
    ]
    found = summarise_pairs(scores, ["x"])
    assert found["dice"] == 0.5
    assert found["dice_empty"] == 0.5
    assert found["dice_filled"] == 0.5
    assert found["empty_share"] == 0.5
    assert found["all_foreground_dice"] == 0.5


def test_miou_of_maps_leaves_out_classes_that_nobody_saw() -> None:
    assert mean_iou_of_maps({0: 1, 1: 3}, {0: 4, 1: 4, 2: 0}, ["a", "b", "c"]) == {
        "argmax_miou": 0.5, "argmax_iou/a": 0.25, "argmax_iou/b": 0.75,
    }  # fmt: skip
