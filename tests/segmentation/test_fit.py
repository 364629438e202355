from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import vlprompt
from vlprompt.backbones import Backbone
from vlprompt.core.errors import CheckpointError, ConfigError, DataError
from vlprompt.data import load_segmentation
from vlprompt.data.segmentation import MaskDataset
from vlprompt.segmentation import Segmenter
from vlprompt.segmentation.fit import (
    SegmentationTask,
    SegmentTrainOptions,
    check_phrases,
    fit_segmenter,
)
from vlprompt.segmentation.losses import segmentation_loss
from vlprompt.training.callbacks import Callback

SMALL = {"weights": "random", "reduce": 8, "hidden": 16}


@pytest.fixture(scope="module")
def tiny() -> Backbone:
    return vlprompt.create_backbone("tiny")


@pytest.fixture(scope="module")
def parts() -> tuple[MaskDataset, MaskDataset]:
    return load_segmentation("scenes/masks", "train", images=8), load_segmentation(
        "scenes/masks", "val", images=4
    )


def _made(tiny: Backbone, strategy: str = "decoder", **options: Any) -> Segmenter:
    return vlprompt.create_segmenter("clipseg", tiny, strategy, **SMALL, **options)


def _same(a: Segmenter, b: Segmenter) -> bool:
    return all(
        torch.equal(x, y)
        for x, y in zip(a.trainable_state().values(), b.trainable_state().values(), strict=True)
    )


def test_the_recipe_is_the_papers() -> None:
    recipe = SegmentTrainOptions()
    assert (recipe.epochs, recipe.optimizer, recipe.lr, recipe.batch_size) == (20, "adamw", 2e-4, 32)
    assert (recipe.schedule, recipe.plateau_factor, recipe.plateau_patience, recipe.monitor) == (
        "plateau",
        0.2,
        5,
        "loss",
    )
    assert (recipe.stop_patience, recipe.stop_delta, recipe.min_epochs) == (12, 1e-4, 10)
    assert (recipe.select, recipe.select_metric) == ("best", "dice")


def test_training_lowers_the_loss_and_keeps_the_best_epoch(tiny: Backbone, parts: Any) -> None:
    segmenter = _made(tiny)
    found = fit_segmenter(segmenter, *parts, epochs=8, lr=0.02, batch_size=4, callbacks=[])
    assert found.history[-1]["loss"] < 0.9 * found.history[0]["loss"]
    assert found.metrics["val/dice"] == max(record["val/dice"] for record in found.history)


@pytest.mark.parametrize("strategy", ["vpt", "decoder"])
def test_cached_states_change_nothing(tiny: Backbone, parts: Any, strategy: str) -> None:
    runs = [
        fit_segmenter(
            _made(tiny, strategy), *parts, epochs=2, lr=0.01, batch_size=4, callbacks=[], cache_mb=mb
        )
        for mb in (2000, 0)
    ]
    for a, b in zip(*(run.history for run in runs), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


class _StopAt(Callback):
    def __init__(self, steps: int) -> None:
        self.left = steps

    def on_step(self, trainer: Any, losses: dict[str, float]) -> None:
        self.left -= 1
        if self.left == 0:
            raise InterruptedError


@pytest.mark.parametrize("augmentation", ["none", "slight"])
def test_a_killed_run_continues_to_the_last_bit(
    tiny: Backbone, parts: Any, tmp_path: Path, augmentation: str
) -> None:
    options: dict[str, Any] = {
        "epochs": 4, "lr": 0.01, "batch_size": 3, "augmentation": augmentation, "checkpoint_seconds": 0,
        "plateau_patience": 0,
    }  # fmt: skip
    whole = _made(tiny, "vpt")
    history = fit_segmenter(whole, *parts, callbacks=[], **options).history
    with pytest.raises(InterruptedError):
        fit_segmenter(_made(tiny, "vpt"), *parts, folder=tmp_path, callbacks=[_StopAt(8)], **options)
    resumed = _made(tiny, "vpt")
    with torch.no_grad():
        resumed.strategy.context.mul_(0)  # type: ignore[operator]  # nothing of it may survive
    again = fit_segmenter(resumed, *parts, folder=tmp_path, resume=True, callbacks=[], **options)
    assert again.history == history
    assert _same(resumed, whole)


def test_another_run_is_not_continued(tiny: Backbone, parts: Any, tmp_path: Path) -> None:
    fit_segmenter(_made(tiny, "vpt"), *parts, folder=tmp_path, epochs=1, callbacks=[])
    with pytest.raises(CheckpointError, match="segmenter_options"):
        fit_segmenter(_made(tiny, "coop"), *parts, folder=tmp_path, epochs=1, resume=True, callbacks=[])
    other = parts[0].subset(range(4))
    with pytest.raises(CheckpointError, match="pairs: checkpoint"):
        fit_segmenter(
            _made(tiny, "vpt"), other, parts[1], folder=tmp_path, epochs=1, resume=True, callbacks=[]
        )


def test_only_weight_matrices_decay(tiny: Backbone) -> None:
    prompts = SegmentationTask(_made(tiny, "vpt"), segmentation_loss())
    assert prompts.parameter_groups() == [{"names": ["segmenter.strategy.context"], "weight_decay": 0.0}]
    task = SegmentationTask(_made(tiny, "decoder"), segmentation_loss())
    learned = {n: p for n, p in task.named_parameters() if p.requires_grad}
    decayed, spared = (set(group["names"]) for group in task.parameter_groups())
    assert decayed | spared == set(learned)
    assert not decayed & spared
    assert all(n.endswith("weight") and "norm" not in n and learned[n].dim() > 1 for n in decayed)
    assert {n for n in learned if n.endswith("bias") or "norm" in n} <= spared


def test_without_validation_the_last_epoch_is_kept_at_a_constant_rate(tiny: Backbone, parts: Any) -> None:
    history = fit_segmenter(_made(tiny, "vpt"), parts[0], epochs=3, lr=0.01, callbacks=[]).history
    assert [record["lr"] for record in history] == [0.01] * 3


def test_nothing_to_learn_is_only_measured(tiny: Backbone, parts: Any) -> None:
    found = fit_segmenter(_made(tiny, "zero_shot"), *parts)
    assert found.history == []
    assert 0 <= found.metrics["val/dice"] <= 1


def test_long_phrases_are_refused_before_anything_is_trained(tiny: Backbone) -> None:
    room = tiny.text.context_length
    data = load_segmentation("scenes/masks", "train", images=2, phrase="red " * (room - 4))
    check_phrases(_made(tiny, "zero_shot"), data)
    with pytest.raises(
        DataError, match=rf"scenes/masks, train/\d+: the phrase 'red red .*{room + 2} tokens with the 4"
    ):
        fit_segmenter(_made(tiny, "coop"), data, epochs=1)


def test_wrong_options_are_named_with_the_nearest(tiny: Backbone, parts: Any) -> None:
    with pytest.raises(ConfigError, match="epoch: unknown key; did you mean 'epochs'"):
        fit_segmenter(_made(tiny, "vpt"), *parts, epoch=3)


@pytest.mark.parametrize(
    "wrong", [{"cache_mb": -1}, {"cache_mb": "much"}, {"cache_mb": float("nan")}, {"loss": "dise"}]
)
def test_wrong_arguments_are_named_before_anything_is_trained(
    tiny: Backbone, parts: Any, wrong: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=f"fit_segmenter[^$]*{next(iter(wrong))}"):
        fit_segmenter(_made(tiny, "vpt"), *parts, epochs=0, **wrong)
