from __future__ import annotations

import numpy as np
import pytest
import torch

from vlprompt.core.errors import UnknownNameError, VLPromptError
from vlprompt.segmentation.losses import LOSSES, bce, dice, segmentation_loss


def _batch(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(3, 1, 5, 7, generator=generator)
    masks = (torch.rand(3, 5, 7, generator=generator) < 0.3).byte()
    masks[2] = 0
    return logits, masks


def test_dice_of_every_image_by_hand() -> None:
    logits, masks = _batch()
    expected = []
    for image in range(3):
        overlap = total = 0.0
        for p, t in zip(logits[image].flatten().tolist(), masks[image].flatten().tolist(), strict=True):
            q = 1 / (1 + np.exp(-p))
            overlap, total = overlap + q * t, total + q + t
        expected.append(1 - (2 * overlap + 1e-5) / (total + 1e-5))
    assert float(dice(logits, masks)) == pytest.approx(np.mean(expected), rel=1e-5)


def test_a_find_in_an_empty_mask_costs_and_teaches_which_smps_loss_does_not() -> None:
    logits = torch.full((1, 1, 4, 4), 1.0, requires_grad=True)
    empty = torch.zeros(1, 4, 4, dtype=torch.uint8)
    loss = dice(logits, empty)
    assert float(loss.detach()) == pytest.approx(1, abs=1e-5)
    assert float(dice(torch.full((1, 1, 4, 4), -40.0), empty)) == pytest.approx(0, abs=1e-5)
    total = segmentation_loss()(logits, empty)
    gradient = torch.autograd.grad(sum(total.values()), logits)[0]  # type: ignore[arg-type]
    assert bool((gradient > 0).all())
    losses = pytest.importorskip("segmentation_models_pytorch").losses
    assert float(losses.DiceLoss("binary")(logits, empty[:, None].float())) == 0


def test_cross_entropy_and_a_single_images_dice_are_smps() -> None:
    losses = pytest.importorskip("segmentation_models_pytorch").losses
    logits, masks = _batch()
    theirs = losses.SoftBCEWithLogitsLoss()(logits, masks[:, None].float())
    assert float(bce(logits, masks)) == pytest.approx(float(theirs), rel=1e-5)
    for i in range(2):  # theirs pools images, so one at a time; without smoothing
        single = losses.DiceLoss("binary")(logits[i : i + 1], masks[i : i + 1, None].float())
        assert float(dice(logits[i : i + 1], masks[i : i + 1])) == pytest.approx(float(single), rel=1e-4)


def test_pixels_that_do_not_count_change_nothing() -> None:
    logits, masks = _batch()
    wide = torch.cat([masks, torch.full((3, 5, 2), 255, dtype=torch.uint8)], 2)
    padded = torch.cat([logits, torch.full((3, 1, 5, 2), 9.0)], 3)
    for loss in (dice, bce):
        assert float(loss(padded, wide)) == pytest.approx(float(loss(logits, masks)), rel=1e-6)


def test_every_named_loss_falls_when_the_right_pixels_rise() -> None:
    pytest.importorskip("segmentation_models_pytorch")
    _, masks = _batch()
    masks = masks[:2]
    right = torch.where(masks == 1, 3.0, -3.0)[:, None]
    for name in LOSSES:
        loss = segmentation_loss(name)  # type: ignore[arg-type]
        good, bad = (float(sum(loss(x, masks).values())) for x in (right, -right))
        assert good < bad, name


def test_weights_and_wrong_names() -> None:
    logits, masks = _batch()
    found = segmentation_loss("dice_bce", 2.0, 0.5)(logits, masks)
    assert float(found["dice"]) == pytest.approx(2 * float(dice(logits, masks)))
    assert float(found["bce"]) == pytest.approx(0.5 * float(bce(logits, masks)))
    with pytest.raises(UnknownNameError, match="Did you mean 'dice_bce'"):
        segmentation_loss("dice_bc")  # type: ignore[arg-type]
    pytest.importorskip("segmentation_models_pytorch")
    masks[0, 0, 0] = 255
    with pytest.raises(VLPromptError, match="know no ignored pixels"):
        segmentation_loss("smp_jaccard")(logits, masks)
