"""Scores against the plain way: one image and phrase at a time, resized, counted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vlprompt
from tests.data.segmentation import pairs_layouts as lay
from vlprompt.backbones import Backbone
from vlprompt.core.errors import DataError, NonFiniteError
from vlprompt.data import load_segmentation
from vlprompt.segmentation import Segmenter
from vlprompt.segmentation.evaluate import evaluate_segmenter, predict_mask
from vlprompt.segmentation.losses import segmentation_loss
from vlprompt.segmentation.states import PairStates


@pytest.fixture(scope="module")
def tiny() -> Backbone:
    return vlprompt.create_backbone("tiny")


@pytest.fixture(scope="module")
def segmenter(tiny: Backbone) -> Segmenter:
    """With logits on both sides of zero, whatever its decoder was trained for."""
    return vlprompt.create_segmenter("clipseg", tiny, weights="random", reduce=8, hidden=16, seed=5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of several shapes and two classes."""
    rng = np.random.default_rng(0)
    for i, (width, height) in enumerate([(100, 50), (40, 80), (64, 64)]):
        path = tmp_path / "images/test" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (height, width, 3)).astype(np.uint8)).save(path)
        for label, name in enumerate(["cat", "dog", "fish"]):
            mask = np.zeros((height, width), np.uint8)
            mask[label * 9 : label * 9 + 20, 5:33] = 1
            if (i, label) != (1, 1):
                lay.mask_file(tmp_path / "annotations/test" / name / f"{i}.png", mask)
    return tmp_path


def _one_by_one(segmenter: Segmenter, image: Image.Image, phrase: str, size: tuple[int, int]) -> np.ndarray:
    with torch.no_grad():
        logits = segmenter(segmenter.preprocess(image)[None], [phrase])
    resized = torch.nn.functional.interpolate(logits, size, mode="bilinear", align_corners=False)
    return resized[0, 0].sigmoid().numpy()


def _middle(segmenter: Segmenter, folder: Path) -> float:
    """A threshold that cuts predictions in two, since random logits need not lie around zero."""
    data = load_segmentation(f"per_class:{folder}", "test")
    return float(
        np.median(np.concatenate([predict_mask(segmenter, x.image, x.phrase).ravel() for x in data]))
    )  # type: ignore[attr-defined]


@pytest.mark.parametrize("batch_size", [1, 16])
def test_scores_at_the_masks_own_size(segmenter: Segmenter, folder: Path, batch_size: int) -> None:
    threshold = _middle(segmenter, folder)
    data = load_segmentation(f"per_class:{folder}", "test", queries="all")
    found = evaluate_segmenter(segmenter, data, threshold=threshold, batch_size=batch_size, argmax=True)
    dice = []
    inter, union = np.zeros(3), np.zeros(3)
    for pairs in data.images().values():
        probs = []
        for i in pairs:
            pair = data[i]
            probs.append(_one_by_one(segmenter, pair.image, pair.phrase, pair.mask.shape))
            ours, true = probs[-1] > threshold, pair.mask == 1
            dice.append(2 * (ours & true).sum() / (ours.sum() + true.sum()))
        best = np.argmax(probs, 0)
        best[np.max(probs, 0) <= threshold] = -1
        for i in pairs:
            label, true = data[i].label, data[i].mask == 1
            inter[label] += ((best == label) & true).sum()
            union[label] += ((best == label) | true).sum()
    assert [p.dice for p in found.pairs] == pytest.approx(dice, abs=1e-3)
    assert 0.02 < np.mean(dice) < 0.9
    assert found.metrics["argmax_miou"] == pytest.approx(np.mean(inter / union), abs=1e-3)
    assert found.metrics["empty_share"] == pytest.approx(1 / 9)


def test_present_classes_alone_hide_false_finds(segmenter: Segmenter, folder: Path) -> None:
    present = load_segmentation(f"per_class:{folder}", "test")
    every = load_segmentation(f"per_class:{folder}", "test", queries="all")
    assert (len(present), len(every)) == (8, 9)
    a, b = (evaluate_segmenter(segmenter, d, threshold=0.0).metrics for d in (present, every))
    assert a["dice"] == pytest.approx(a["all_foreground_dice"])
    assert b["dice_empty"] == 0
    assert b["dice"] == pytest.approx(a["dice"] * 8 / 9)
    with pytest.raises(DataError, match="queries='all'"):
        evaluate_segmenter(segmenter, present, argmax=True)


def test_states_that_are_kept_change_nothing_and_the_loss_is_a_mean_over_pairs(segmenter: Segmenter) -> None:
    data = load_segmentation("scenes/masks", "val", images=7)
    loss = segmentation_loss()
    plain = evaluate_segmenter(segmenter, data, loss=loss, batch_size=3)
    states = PairStates(segmenter, data, batch_size=4)
    assert states.prepare()
    for _ in range(2):
        kept = evaluate_segmenter(segmenter, data, loss=loss, batch_size=3, states=states)
        assert kept.metrics == pytest.approx(plain.metrics, abs=1e-5)
    each = []
    for i in range(len(data)):
        pair = data[i]
        logits = segmenter(segmenter.preprocess(pair.image)[None], [pair.phrase])
        each.append(float(sum(loss(logits, torch.from_numpy(pair.mask)[None]).values())))
    assert plain.metrics["loss"] == pytest.approx(np.mean(each), rel=1e-4)
    assert not PairStates(segmenter, data, limit_mb=0.01).prepare()


def test_nothing_of_an_image_is_cropped(segmenter: Segmenter) -> None:
    """The left end of a wide image reaches the model, and comes out at the left end of the mask."""
    wide = Image.new("RGB", (256, 64), "white")
    marked = wide.copy()
    marked.paste("red", (0, 0, 24, 64))
    change = np.abs(predict_mask(segmenter, marked, "a red bar") - predict_mask(segmenter, wide, "a red bar"))
    assert change.shape == (64, 256)
    assert change.max() > 0
    pixels = segmenter.preprocess(marked) - segmenter.preprocess(wide)
    columns = pixels.abs().sum((0, 1)).nonzero()[:, 0]
    assert columns.min() == 0
    assert columns.max() <= 8  # 24 of 256 pixels are 6 of 64


def test_logits_that_are_nan_are_no_empty_mask(tiny: Backbone, folder: Path) -> None:
    """Compared with a threshold they would look as if nothing were there, and score 0."""
    broken = vlprompt.create_segmenter("clipseg", tiny, weights="random", reduce=8, hidden=16, seed=5)
    for parameter in broken.decoder.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    with pytest.raises(NonFiniteError, match="logits of a mask are NaN"):
        predict_mask(broken, Image.new("RGB", (20, 30)), "a red circle")
    with pytest.raises(NonFiniteError, match="logits of a mask are NaN"):
        evaluate_segmenter(broken, load_segmentation(f"per_class:{folder}", "test"))


def test_what_is_no_image_no_phrase_and_no_pair_is_refused(segmenter: Segmenter) -> None:
    with pytest.raises(DataError, match="got uint8, raw pixels"):
        segmenter(torch.zeros(1, 3, 32, 32, dtype=torch.uint8), ["a red circle"])
    with pytest.raises(DataError, match="phrase number 0 is no text; got NoneType"):
        segmenter(torch.zeros(1, 3, 32, 32), [None])
    with pytest.raises(DataError, match=r"load_segmentation.* got str 'pairs:masks'"):
        evaluate_segmenter(segmenter, "pairs:masks")  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"load_segmentation.* got list"):
        vlprompt.fit_segmenter(segmenter, [])  # type: ignore[arg-type]
