"""Several tasks, one set of prompts: exact losses, fair draws, no wasted text, resume to the last bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from vlprompt import create_learner, evaluate, fit, load_dataset
from vlprompt.backbones import Backbone
from vlprompt.classification.multitask import (
    MultiTask,
    TaskData,
    common_templates,
    fit_multitask,
    union_of_classes,
)
from vlprompt.classification.options import MultiTaskOptions
from vlprompt.classification.task_batches import MultiTaskBatches, task_quotas
from vlprompt.core.errors import DataError
from vlprompt.data import ImageDataset
from vlprompt.learners import Learner
from vlprompt.training.batches import Batch, TensorBatches
from vlprompt.training.callbacks import Callback, TrainingView

ANIMALS = (["dog", "hummingbird", "cat"], ("a photo of a {}.",))
SHAPES = (["red circle", "blue square"], ("a drawing of a {}.",))
MIXED = (["Cat", "red circle", "aeroplane"], ("a photo of a {}.",))
TASKS = {"animals": ANIMALS, "shapes": SHAPES}
TRANSFERABLE = ("coop", "cocoop", "kgcoop", "prograd", "vpt", "upt", "maple", "ivlp", "promptsrc", "mvlpt")


def _batch(images: Tensor, task: Sequence[int], label: Sequence[int]) -> Batch:
    return {"image": images, "task": torch.tensor(task), "label": torch.tensor(label)}


def _gradients(learner: Learner, losses: dict[str, Tensor]) -> list[Tensor]:
    parameters = [p for p in learner.parameters() if p.requires_grad]
    total = torch.stack(list(losses.values())).sum()
    return list(torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize("name", TRANSFERABLE)
def test_the_loss_is_the_single_task_loss_of_the_same_samples(
    name: str, backbone: Backbone, images: Tensor
) -> None:
    """Four images of one task and two of another: 4/6 of the one task's loss and 2/6 of the other's."""
    learner = create_learner(name, backbone, *ANIMALS).train()
    other = learner.with_classes(*SHAPES)
    module = MultiTask(learner, TASKS)
    mixed = module.loss(_batch(images, [0, 1, 0, 0, 1, 0], [2, 1, 0, 1, 0, 2]))
    first, second = [0, 2, 3, 5], [1, 4]
    alone = learner.loss({"image": images[first], "label": torch.tensor([2, 0, 1, 2])})
    foreign = other.loss({"image": images[second], "label": torch.tensor([1, 0])})
    for key, value in mixed.items():
        torch.testing.assert_close(value, (4 * alone[key] + 2 * foreign[key]) / 6, rtol=1e-4, atol=1e-5)
    parts = zip(_gradients(learner, alone), _gradients(other, foreign), strict=True)
    expected = [(4 * a + 2 * b) / 6 for a, b in parts]
    for got, want in zip(_gradients(learner, mixed), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5 + 1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("family", ["coop", "vpt", "upt"])
def test_a_foreign_task_changes_nothing(family: str, backbone: Backbone, images: Tensor) -> None:
    learner = create_learner("mvlpt", backbone, *ANIMALS, family=family).train()
    batch = _batch(images, [0] * 6, [2, 1, 0, 1, 0, 2])
    alone = MultiTask(learner, {"animals": ANIMALS}).loss(batch)
    beside = MultiTask(learner, TASKS).loss(batch)
    assert torch.equal(alone["cross_entropy"], beside["cross_entropy"])
    joint = MultiTask(learner, TASKS, "joint").loss(batch)
    assert joint["cross_entropy"] > alone["cross_entropy"]


def test_equal_names_cost_log_two_unless_merged(backbone: Backbone, images: Tensor) -> None:
    """In a joint label space "cat" of two tasks has one text feature: it can win half of the probability at most."""
    learner = create_learner("mvlpt", backbone, *ANIMALS, family="coop").train()
    tasks = {"one": (["cat", "dog"], ("a {}.",)), "two": (["cat", "dog"], ("the {}.",))}
    batch = _batch(images, [0, 1, 0, 1, 0, 1], [0, 0, 1, 1, 0, 1])
    losses = {
        space: MultiTask(learner, tasks, space).loss(batch)["cross_entropy"].item()
        for space in ("per_task", "joint", "joint_dedup")
    }
    assert losses["joint_dedup"] == pytest.approx(losses["per_task"], abs=1e-5)
    assert losses["joint"] == pytest.approx(losses["joint_dedup"] + np.log(2), abs=1e-5)


def test_joint_spaces_number_all_classes(backbone: Backbone, images: Tensor) -> None:
    learner = create_learner("coop", backbone, *ANIMALS, context_length=4).train()
    tasks = {"animals": ANIMALS, "mixed": MIXED}
    union, places = union_of_classes([ANIMALS[0], MIXED[0]])
    assert union == ("dog", "hummingbird", "cat", "red circle", "aeroplane")
    assert places == [[0, 1, 2], [2, 3, 4]]
    batch = _batch(images[:2], [1, 0], [0, 1])
    logits = learner.with_classes(union)(images[:2])
    merged = torch.nn.functional.cross_entropy(logits, torch.tensor([2, 1]))
    torch.testing.assert_close(MultiTask(learner, tasks, "joint_dedup").loss(batch)["cross_entropy"], merged)
    apart = torch.nn.functional.cross_entropy(logits[:, [0, 1, 2, 2, 3, 4]], torch.tensor([3, 1]))
    torch.testing.assert_close(MultiTask(learner, tasks, "joint").loss(batch)["cross_entropy"], apart)


def test_only_the_names_of_tasks_in_the_batch_are_encoded(backbone: Backbone, images: Tensor) -> None:
    module = MultiTask(create_learner("mvlpt", backbone, *ANIMALS).train(), {**TASKS, "mixed": MIXED})
    sentences: list[int] = []
    handle = backbone.text.norm.register_forward_hook(
        lambda _, __, out: sentences.append(out[..., 0].numel())
    )
    try:
        for tasks, expected in (([1] * 6, 2), ([0, 2, 0, 2, 2, 2], 6), ([0, 1, 2, 0, 1, 2], 8)):
            sentences.clear()
            module.loss(_batch(images, tasks, [0] * 6))
            assert sum(sentences) == expected
    finally:
        handle.remove()


def test_the_image_tower_runs_once_for_all_tasks(backbone: Backbone, images: Tensor) -> None:
    module = MultiTask(create_learner("mvlpt", backbone, *ANIMALS).train(), TASKS)
    sizes: list[int] = []
    first = backbone.vision.blocks[0]
    handle = first.register_forward_hook(lambda _, __, out: sizes.append(len(out)))
    try:
        module.loss(_batch(images, [0, 1, 0, 1, 0, 1], [0] * 6))
    finally:
        handle.remove()
    assert sizes == [6]


def test_learned_values_are_the_same_objects_in_every_task(backbone: Backbone) -> None:
    learner = create_learner("maple", backbone, *ANIMALS)
    module = MultiTask(learner, TASKS)
    state = {n: p + 1 for n, p in learner.trainable_state().items()}
    module.load_trainable_state(state)
    for task in module.tasks.values():
        assert all(torch.equal(p, state[n]) for n, p in task.trainable_state().items())
    assert {n for n, p in module.named_parameters() if p.requires_grad} == set(state)


def test_what_belongs_to_classes_or_samples_is_refused_by_name(backbone: Backbone) -> None:
    for name in ("linear_probe", "tip_adapter_f"):
        with pytest.raises(DataError, match=f"{name} keeps one set"):
            MultiTask(create_learner(name, backbone, *ANIMALS), TASKS)
    bound = create_learner("coop", backbone, *ANIMALS, class_specific=True)
    with pytest.raises(DataError, match="one set of parameters per class"):
        MultiTask(bound, TASKS)
    own_loss = create_learner("promptsrc", backbone, *ANIMALS)
    with pytest.raises(DataError, match="Use label_space joint_dedup"):
        MultiTask(own_loss, {"a": ANIMALS, "b": ANIMALS}, "joint")


def test_templates_are_shared_only_if_they_agree() -> None:
    assert common_templates([("a {}.",), ["a {}."]]) == ("a {}.",)
    assert common_templates([("a {}.",), ("the {}.",)]) == ("a photo of a {}.",)


@pytest.mark.parametrize(
    ("options", "quotas"),
    [
        ({}, [10, 30, 160]),
        ({"sampler": "balanced"}, [67, 67, 66]),
        ({"sampler": "temperature", "alpha": 0.5}, [30, 51, 119]),
    ],
)
def test_samplers_draw_what_they_promise(options: dict[str, object], quotas: list[int]) -> None:
    sizes = [10, 30, 160]
    assert task_quotas(sizes, MultiTaskOptions(**options).exponent) == quotas
    sources = [TensorBatches({"x": [torch.arange(n)], "label": [torch.zeros(n).long()]}, 8, 1) for n in sizes]
    batches = MultiTaskBatches(sources, sizes, MultiTaskOptions(**options).exponent, 8, seed=1)
    orders = []
    for epoch in range(3):
        plan = batches.plan(epoch)
        assert all(np.array_equal(a, b) for a, b in zip(plan, batches.plan(epoch), strict=True))
        parts = [batches.fetch(part, epoch) for part in plan]
        task, x = (torch.cat([p[k] for p in parts]) for k in ("task", "x"))
        assert torch.bincount(task).tolist() == quotas
        for number, size in enumerate(sizes):
            times = torch.bincount(x[task == number], minlength=size)
            assert times.max() - times.min() <= 1
        index = torch.cat([p["index"] for p in parts])
        assert torch.equal(x, index - torch.tensor([0, 10, 40])[task])
        mixed = sum(len(p["task"].unique()) > 1 for p in parts)
        assert mixed > len(parts) // 2
        orders.append(index)
    assert not torch.equal(orders[0], orders[1])


def _scene(name: str, split: str, shots: int) -> ImageDataset:
    return load_dataset(f"scenes/{name}", split, shots=shots, seed=1, size=32)


@pytest.fixture(scope="module")
def scenes() -> dict[str, TaskData]:
    return {n: TaskData(_scene(n, "train", 3), _scene(n, "val", 2)) for n in ("size", "kind")}


def _learner(backbone: Backbone, family: str = "coop") -> Learner:
    names, _ = union_of_classes([["small", "medium", "large"], ["geometric shape", "digit"]])
    return create_learner("mvlpt", backbone, names, family=family, context_length=2, visual_length=2)


OPTIONS = {"epochs": 4, "batch_size": 4, "lr": 0.02, "callbacks": [], "checkpoint_seconds": 0.0}


class _KilledError(Exception):
    pass


class _Kill(Callback):
    """Stops a run at a step, as a kill would: nothing is saved on the way out."""

    def __init__(self, step: int) -> None:
        self.left = step

    def on_step(self, trainer: TrainingView, losses: dict[str, float]) -> None:
        self.left -= 1
        if not self.left:
            raise _KilledError


@pytest.mark.parametrize(("family", "views"), [("coop", 2), ("upt", 0)])
def test_resumed_equals_uninterrupted_bit_for_bit(
    family: str, views: int, backbone: Backbone, scenes: dict[str, TaskData], tmp_path: Path
) -> None:
    options = {**OPTIONS, "augmentation": "crop_flip", "views": views, "select": "best"}
    sharing = MultiTaskOptions(sampler="temperature")
    whole = _learner(backbone, family)
    expected, _ = fit_multitask(whole, scenes, sharing, folder=tmp_path / "whole", **options)
    kill = {**options, "callbacks": [_Kill(8)]}
    with pytest.raises(_KilledError):
        fit_multitask(_learner(backbone, family), scenes, sharing, folder=tmp_path / "cut", **kill)
    resumed = _learner(backbone, family)
    result, _ = fit_multitask(resumed, scenes, sharing, folder=tmp_path / "cut", resume=True, **options)
    state = resumed.trainable_state()
    assert all(torch.equal(state[n], t) for n, t in whole.trainable_state().items())
    assert result.history == expected.history


def test_one_task_is_ordinary_training(backbone: Backbone, scenes: dict[str, TaskData]) -> None:
    data = scenes["size"]
    # The order of samples is another draw, so one batch of everything compares.
    whole = {**OPTIONS, "batch_size": len(data.train)}
    single, shared = (_learner(backbone).with_classes(data.train.classnames) for _ in range(2))
    fit(single, data.train, data.val, **whole)
    fit_multitask(shared, {"size": data}, **whole)
    torch.testing.assert_close(single.context, shared.context)


def test_scores_are_unweighted_means_of_fractions_on_own_classes(
    backbone: Backbone, scenes: dict[str, TaskData]
) -> None:
    """Evaluating twice gives the same: labels are never shifted in place, and no task counts by its size."""
    learner = _learner(backbone)
    result, module = fit_multitask(learner, scenes, **OPTIONS)
    tests = {n: load_dataset(f"scenes/{n}", "test", shots=k, size=32) for n, k in (("size", 3), ("kind", 9))}
    numbers = module.evaluate(tests)
    assert numbers == module.evaluate(tests)
    own = [evaluate(learner.with_classes(t.classnames), t)["accuracy"] for t in tests.values()]
    assert [numbers[f"{n}/accuracy"] for n in tests] == own
    assert numbers["accuracy"] == pytest.approx(np.mean(own))
    assert all(0 <= numbers[f"{n}/accuracy"] <= 1 for n in tests)
    last = result.history[-1]
    assert last["val/accuracy"] == pytest.approx((last["val/size/accuracy"] + last["val/kind/accuracy"]) / 2)


def test_hooks_of_a_learner_reach_the_trainer(backbone: Backbone, scenes: dict[str, TaskData]) -> None:
    """PromptSRC's average over epochs, and ProGrad's way of joining gradients, work on several tasks too."""
    names, _ = union_of_classes([d.train.classnames for d in scenes.values()])
    averaged = create_learner("promptsrc", backbone, names, average_mean=1.0, average_std=0.1)
    result, _ = fit_multitask(averaged, scenes, **OPTIONS)
    assert averaged.running_state()
    assert {"cross_entropy", "scl_text"} <= set(result.history[-1])
    projected = create_learner("prograd", backbone, names)
    before = projected.trainable_state()["context"].clone()
    fit_multitask(projected, scenes, **OPTIONS)
    assert not torch.equal(before, projected.trainable_state()["context"])


def test_joint_training_lowers_the_loss(backbone: Backbone, scenes: dict[str, TaskData]) -> None:
    sharing = MultiTaskOptions(label_space="joint_dedup", sampler="balanced")
    result, _ = fit_multitask(_learner(backbone), scenes, sharing, **{**OPTIONS, "epochs": 8})
    assert result.history[-1]["loss"] < result.history[0]["loss"]


def test_no_samples_and_no_task_are_named(backbone: Backbone, scenes: dict[str, TaskData]) -> None:
    empty = TaskData(replace(scenes["size"].train, samples=()))
    with pytest.raises(DataError, match="size: there are no training samples"):
        fit_multitask(_learner(backbone), {"size": empty}, **OPTIONS)
    with pytest.raises(DataError, match="at least one data set"):
        fit_multitask(_learner(backbone), {}, **OPTIONS)
