"""Kept prefixes: a run that goes on from them ends with the very bits of a run that reads pixels in every step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from vlprompt import create_learner, evaluate, fit, load_dataset
from vlprompt.backbones import Backbone
from vlprompt.backbones.vision import PixelPrompts, VisualPrompts
from vlprompt.classification.fit import RunResult
from vlprompt.classification.multitask import TaskData, fit_multitask
from vlprompt.classification.prefixes import KeptStates
from vlprompt.classification.sources import ImageBatches, TrainingSource
from vlprompt.core.errors import VLPromptError
from vlprompt.data import Augmentation, FeatureCache, ImageDataset
from vlprompt.learners import LEARNERS, Learner
from vlprompt.training.batches import TensorBatches
from vlprompt.training.callbacks import Callback
from vlprompt.training.options import TrainOptions

RUN: dict[str, Any] = {"epochs": 3, "batch_size": 8, "lr": 2e-3, "callbacks": [], "checkpoint_seconds": 0.0}
MASKS: dict[str, Any] = {"lr": 4e-3, "optimizer": "adam", "weight_decay": 0.0}
LAST = ("transformer.resblocks.2.*",)

# What enters where: a label, the learner and its options, the stages below.
PLACES: dict[str, tuple[str, dict[str, Any], int]] = {
    "deep tokens": ("vpt", {}, 1),
    "shallow tokens": ("vpt", {"visual_depth": 1, "visual_length": 2}, 1),
    "appended tokens": ("vpt", {"insertion": "append"}, 1),
    "dropped tokens": ("vpt", {"dropout": 0.3}, 1),
    "pixels": ("vpt", {"where": "pixels"}, 0),
    "both towers": ("mvlpt", {"family": "upt"}, 1),
    "updates of all blocks": ("clip_lora", {"encoder": "vision"}, 1),
    "updates of the upper third": ("clip_lora", {"layers": "up"}, 3),
    "updates of the last two blocks": ("clip_lora", {"layers": "top2", "encoder": "vision"}, 2),
    "bottlenecks beside the last block": ("mma", {"depth": 1}, 3),
    "what follows attention in the last block": ("apt", {"blocks": [2]}, 3),
    "keys and values of the last two blocks": ("kv_prompts", {"blocks": [1, 2]}, 2),
    "tokens before the last two blocks": ("mmrl", {"depth": 2}, 2),
    "norms of all blocks": ("two_stage", {}, 1),
    "masks of all blocks": ("amt", {}, 1),
    "masks of the stem": ("pmt", {}, 0),
    "masks of the last block": ("ramt", {"tensors": LAST}, 3),
    "masks of the last block, and tokens": ("mmt", {"tensors": LAST, "prompts": "vpt"}, 1),
}


@pytest.fixture(scope="module")
def data() -> ImageDataset:
    return load_dataset("scenes/shape", "train", shots=2)


@pytest.fixture(scope="module")
def val() -> ImageDataset:
    return load_dataset("scenes/shape", "val", shots=1)


def learner_for(name: str, backbone: Backbone, data: ImageDataset, **options: Any) -> Learner:
    return create_learner(name, backbone, data.classnames, **options)


def source(
    learner: Learner, data: ImageDataset, cache: FeatureCache | None = None, **changes: Any
) -> TrainingSource:
    """Return what a learner trains on; without chance and with one view, unless changed."""
    values = {"augmentation": Augmentation(), "views": 1, **changes}
    return TrainingSource(
        learner, data, options=TrainOptions(batch_size=8), cache=cache or FeatureCache(), **values
    )


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@contextmanager
def counted(backbone: Backbone) -> Iterator[list[int]]:
    """Count the images that go through the stem."""
    counts: list[int] = []
    stem = backbone.vision.visual.conv1
    handle = stem.register_forward_hook(lambda _, inputs, __: counts.append(len(inputs[0])))
    try:
        yield counts
    finally:
        handle.remove()


def runs(
    name: str,
    backbone: Backbone,
    data: ImageDataset,
    val: ImageDataset,
    options: dict[str, Any],
    **changes: Any,
) -> tuple[RunResult, RunResult]:
    """Train with kept prefixes and without."""
    run = {**RUN, **(MASKS if "masks" in LEARNERS.get(name).summary else {}), **changes}
    with_prefixes, without = (
        fit(learner_for(name, backbone, data, **options), data, val, prefix_gib=gib, **run)
        for gib in (1.0, 0.0)
    )
    return with_prefixes, without


@pytest.mark.parametrize("name", LEARNERS.names())
def test_every_learner_ends_with_the_same_bits(
    name: str, backbone: Backbone, data: ImageDataset, val: ImageDataset
) -> None:
    options = {"text_depth": 2} if name == "promptsrc" else {}
    learner = learner_for(name, backbone, data, **options)
    if learner.static_images:  # nothing enters: embeddings are cached
        assert source(learner, data).states() == []
        return

    kept, without = runs(name, backbone, data, val, options)
    if name == "multi_lane":  # the tower's whole pass, which it keeps, is rounded as batches are cut
        torch.testing.assert_close(
            kept.learner.trainable_state(), without.learner.trainable_state(), rtol=0, atol=1e-5
        )
        return
    assert same_bits(kept.learner.trainable_state(), without.learner.trainable_state())
    assert kept.history == without.history
    kept.metrics.pop("seconds")
    without.metrics.pop("seconds")
    assert kept.metrics == without.metrics


@pytest.mark.parametrize("place", list(PLACES))
def test_wherever_something_enters(
    place: str, backbone: Backbone, data: ImageDataset, val: ImageDataset
) -> None:
    """Views that take turns, micro-batches and a last batch that is cut, too."""
    name, options, stages = PLACES[place]
    assert learner_for(name, backbone, data, **options).frozen_stages() == stages

    changes: dict[str, Any] = {"augmentation": "crop_flip", "views": 2, "accumulation": 2, "batch_size": 12}
    with counted(backbone) as images:
        kept, without = runs(name, backbone, data, val, options, **changes)
    assert same_bits(kept.learner.trainable_state(), without.learner.trainable_state())
    assert kept.history == without.history
    start = learner_for(name, backbone, data, **options).trainable_state()
    assert not same_bits(start, kept.learner.trainable_state())
    assert images


def test_the_stem_runs_once_per_view(
    backbone: Backbone, data: ImageDataset, val: ImageDataset, tmp_path: Path
) -> None:
    """Epochs, a continued run and another run with the same cache folder: no image is encoded a second time."""
    options: dict[str, Any] = {**RUN, "cache_dir": tmp_path / "cache"}
    views = len(data) + len(val)

    with counted(backbone) as images:
        learner = learner_for("vpt", backbone, data)
        fit(learner, data, val, folder=tmp_path / "run", **{**options, "epochs": 2})
    # Batches of either set are filled up, so is a pass, and one black image tells the shape.
    assert views <= sum(images) <= views + 3 * 8 + 2

    with counted(backbone) as images:
        fit(learner, data, val, folder=tmp_path / "other", **{**options, "epochs": 4})
        evaluate(learner, val, cache=FeatureCache(tmp_path / "cache"))
    assert set(images) == {1}  # black images


def test_a_killed_run_continues_with_the_same_bits(
    backbone: Backbone, data: ImageDataset, val: ImageDataset, tmp_path: Path
) -> None:
    straight = fit(learner_for("maple", backbone, data), data, val, **RUN)

    class KilledError(Exception):
        pass

    class Kill(Callback):
        def on_epoch(self, trainer: Any, record: dict[str, Any]) -> None:
            if record["epoch"] == 1:
                raise KilledError

    options = {**RUN, "folder": tmp_path / "run", "cache_dir": tmp_path / "cache"}
    with pytest.raises(KilledError):
        fit(learner_for("maple", backbone, data), data, val, **{**options, "callbacks": [Kill()]})
    continued = fit(learner_for("maple", backbone, data), data, val, resume=True, **options)

    assert same_bits(straight.learner.trainable_state(), continued.learner.trainable_state())
    assert straight.history == continued.history


@pytest.mark.parametrize("name", ["vpt", "ramt"])
def test_tasks_that_are_trained_together(name: str, backbone: Backbone, data: ImageDataset) -> None:
    """Mixed batches hold the states of several tasks; if one of them doesn't fit, all read pixels."""
    tasks = {"shape": TaskData(data), "kind": TaskData(load_dataset("scenes/kind", "train", shots=3))}
    run = {**RUN, **(MASKS if name == "ramt" else {})}

    states = []
    for gib in (1.0, 0.0, 0.0004):  # the last is enough for the first task alone
        learner = learner_for(name, backbone, data)
        fit_multitask(learner, tasks, prefix_gib=gib, **run)
        states.append(learner.trainable_state())
    assert same_bits(states[0], states[1])
    assert same_bits(states[0], states[2])


def test_the_budget_decides(backbone: Backbone, data: ImageDataset, tmp_path: Path) -> None:
    """Bytes of all views count, in memory and in the folder those of earlier runs."""
    learner = learner_for("vpt", backbone, data)
    row = 17 * 64 * 4  # class token and 4 x 4 patches of width 64
    enough = len(data) * row / 2**30

    def kept(cache: FeatureCache, **changes: Any) -> list[KeptStates]:
        return source(learner, data, cache, **changes).states()

    assert kept(FeatureCache(prefix_gib=0)) == []
    assert kept(FeatureCache(prefix_gib=0.99 * enough)) == []
    memory = FeatureCache(prefix_gib=enough)
    assert len(kept(memory)) == 1
    assert len(kept(memory)) == 1  # they are there already
    views = {"augmentation": Augmentation("flip"), "views": 2}
    assert kept(memory, **views) == []

    folder = FeatureCache(tmp_path, prefix_gib=2 * enough)
    assert len(kept(folder)) == 1
    assert kept(FeatureCache(tmp_path, prefix_gib=2 * enough), **views) == []
    assert len(kept(FeatureCache(tmp_path, prefix_gib=0.1 * enough))) == 1
    assert len(kept(FeatureCache(tmp_path, prefix_gib=4 * enough), **views)) == 2


def test_new_views_every_epoch_are_not_kept(backbone: Backbone, data: ImageDataset) -> None:
    learner = learner_for("vpt", backbone, data)
    assert isinstance(source(learner, data).batches(), TensorBatches)
    for views in (0, 3):
        batches = source(learner, data, augmentation=Augmentation("crop_flip"), views=views).batches()
        assert isinstance(batches, TensorBatches if views else ImageBatches)


def test_masks_that_were_chosen_on_the_data(backbone: Backbone, data: ImageDataset) -> None:
    """The place is that of the weights that may be switched off, or are."""
    learner: Any = learner_for("ramt", backbone, data, select="top", select_count=1)
    assert learner.frozen_stages() == 1
    learner.survey([source(learner, data)])
    assert len(learner.learned_parameters()) == 1
    block = backbone.vision.block_of(
        next(iter(learner.learned_parameters())).removeprefix("scores.").replace("/", ".")
    )
    assert block is not None
    assert learner.frozen_stages() == 1 + block

    with torch.no_grad():  # one that doesn't learn any more is off nevertheless
        learner.scores.of("transformer.resblocks.0.attn.in_proj_weight").zero_()
    assert learner.frozen_stages() == 1


def test_states_refuse_what_enters_below_them(backbone: Backbone, images: torch.Tensor) -> None:
    states = backbone.image_states(images, 2)
    tokens = VisualPrompts(torch.zeros(1, 2, 64))
    with pytest.raises(VLPromptError, match="enter before the first block, and 2 blocks have run"):
        backbone.image_embeddings(states, tokens)
    with pytest.raises(VLPromptError, match="enter at the pixels"):
        backbone.image_embeddings(states, PixelPrompts(torch.zeros(3, 32, 32)))
    with pytest.raises(VLPromptError, match="block 1 has an adapter, and 2 blocks have run"):
        backbone.image_embeddings(states, adapters=[None, torch.nn.Linear(64, 192), None])
