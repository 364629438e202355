"""Every registered learner through every way of training: the same hooks are called, or the way is refused by name."""

from __future__ import annotations

import ast
import functools
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.meta.conftest import MakeEpisodes, hierarchy, make_episodes, store  # noqa: F401 - fixtures
from vlprompt import fit, load_dataset, save
from vlprompt.backbones import Backbone
from vlprompt.classification.multitask import TaskData, fit_multitask
from vlprompt.classification.options import MultiTaskOptions
from vlprompt.classification.transfer import start_from
from vlprompt.core.errors import CheckpointError, DataError
from vlprompt.core.trainable import Hooks
from vlprompt.data import ImageDataset
from vlprompt.learners import LEARNERS, Learner
from vlprompt.learners.hooks import LearnerHooks
from vlprompt.meta.episodes import EpisodeBatches
from vlprompt.meta.learning import MetaPrompts
from vlprompt.meta.options import MetaOptions
from vlprompt.training.options import TrainOptions
from vlprompt.training.trainer import Trainer

PACKAGE = Path(__file__).resolve().parent.parent / "vlprompt"
TRIGGERS = ["clean", "blended", "sig"]
OPTIONS: dict[str, dict[str, Any]] = {
    "dbom": {"triggers": TRIGGERS, "hidden": 16},
    "promptsrc": {"text_depth": 2},
}
RUN: dict[str, Any] = {"epochs": 1, "batch_size": 16, "lr": 1e-3, "callbacks": [], "checkpoint_seconds": 0.0}

OF_TRAINER = {name for name, member in vars(Hooks).items() if inspect.isfunction(member)}
OF_LEARNER = {name for name, member in vars(LearnerHooks).items() if inspect.isfunction(member)}
# The outer step has losses and clipping of its own, and there are no labelled data to see or to choose on.
NOT_IN_META = {"combine_gradients", "transform_gradients", *(OF_LEARNER - OF_TRAINER)}

Calls = set[str]


def _spied(kind: type[Learner], calls: Calls) -> type[Learner]:
    """Return a subclass that notes which hooks are called, on a learner or on its twins for other classes."""

    def noting(name: str) -> Any:
        original = getattr(kind, name)

        @functools.wraps(original)
        def hook(self: Learner, *arguments: Any, **options: Any) -> Any:
            calls.add(name)
            return original(self, *arguments, **options)

        return hook

    return type(f"Spied{kind.__name__}", (kind,), {name: noting(name) for name in OF_TRAINER | OF_LEARNER})


def _build(name: str, backbone: Backbone, data: ImageDataset, calls: Calls) -> Learner:
    kind = _spied(LEARNERS.get(name).target, calls)
    learner = kind(backbone, data.classnames, data.templates, **OPTIONS.get(name, {}))
    learner.method = name
    return learner


def _expected(learner: Learner) -> Calls:
    hooks = {"enter_folder", "survey", "calibrate", "figures"}
    if learner.prepares:
        hooks.add("prepare")
    if learner.solves:
        return hooks | {"solve"}
    if learner.learned_parameters():
        hooks |= OF_TRAINER if learner.combines_gradients else OF_TRAINER - {"combine_gradients"}
    return hooks


def _part(name: str, split: str) -> ImageDataset:
    whole = load_dataset(f"triggered:{name}", split, shots=2, triggers=TRIGGERS)
    return whole.subset(range(0, len(whole), max(1, len(whole) // 24)))


@pytest.fixture(scope="module")
def tasks() -> dict[str, TaskData]:
    return {name: TaskData(_part(name, "train"), _part(name, "val")) for name in ("digits", "scenes/shape")}


@pytest.mark.parametrize("name", LEARNERS.names())
def test_every_way_of_training_calls_the_same_hooks(
    name: str, backbone: Backbone, tasks: dict[str, TaskData], tmp_path: Path
) -> None:
    digits = tasks["digits"]
    calls: Calls = set()
    learner = _build(name, backbone, digits.train, calls)
    expected = _expected(learner)

    for resume in (False, True):  # the second time continues from the checkpoint
        fit(learner, digits.train, digits.val, folder=tmp_path / "single", resume=resume, **RUN)
    assert calls == expected

    # The target stage: a new learner starts from what was saved.
    save(learner, tmp_path / "prompt")
    calls.clear()
    target = _build(name, backbone, digits.train, calls)
    if learner.prepares and name != "cones":  # a cache of samples is no start for other samples
        with pytest.raises(CheckpointError, match=f"can't start {name}"):
            start_from(target, [tmp_path / "prompt"])
    else:
        start_from(target, [tmp_path / "prompt"])
    for resume in (False, True):
        fit(target, digits.train, digits.val, folder=tmp_path / "target", resume=resume, **RUN)
    assert calls == expected

    calls.clear()
    shared = _build(name, backbone, digits.train, calls)
    if shared.prepares or shared.solves or shared.class_bound or shared.head_bound:
        with pytest.raises(
            DataError, match=f"{name} (keeps one set of values|learned one set of parameters)"
        ):
            fit_multitask(shared, tasks, **RUN)
        return
    for resume in (False, True):
        fit_multitask(shared, tasks, folder=tmp_path / "several", resume=resume, **RUN)
    assert calls == expected


@pytest.mark.parametrize("name", LEARNERS.names())
def test_meta_training_calls_what_has_a_meaning_there(
    name: str,
    backbone: Backbone,
    tasks: dict[str, TaskData],
    make_episodes: MakeEpisodes,  # noqa: F811 - the fixture
    tmp_path: Path,
) -> None:
    calls: Calls = set()
    learner = _build(name, backbone, tasks["digits"].train, calls)
    options = MetaOptions.model_validate({"regulator": {"name": "diagonal"}})
    refusal = ""
    try:
        module = MetaPrompts(learner, options)
    except DataError as error:
        refusal = str(error)
    if refusal:
        assert name in refusal
        return

    pixels = not learner.static_images
    episodes = make_episodes(pixels=pixels, ways=2, support=1, query=1, per_epoch=1)
    once = TrainOptions(epochs=1, batch_size=1, lr=1e-3, checkpoint_seconds=0)
    for resume in (False, True):
        Trainer(module, EpisodeBatches(episodes, 1), once, tmp_path, callbacks=[]).run(resume)
    assert calls == _expected(learner) - NOT_IN_META


def test_tasks_share_what_dbom_measures(backbone: Backbone, tasks: dict[str, TaskData]) -> None:
    """Statistics and calibration are of all tasks together, the pairs that training shows are each task's."""
    learner = _build("dbom", backbone, tasks["digits"].train, set())
    result, module = fit_multitask(learner, tasks, **RUN)
    assert not torch.equal(learner.evidence_mean, torch.zeros_like(learner.evidence_mean))
    for name, data in tasks.items():
        classifier = module.tasks[name]
        assert torch.equal(classifier.evidence_mean, learner.evidence_mean)
        assert torch.equal(classifier.calibration, learner.calibration)
        assert torch.equal(classifier.seen, torch.as_tensor(data.train.compositions.seen))
        assert f"val/{name}/auroc" in result.metrics
    assert result.metrics["chosen/threshold"] == pytest.approx(float(learner.calibration[2]))


def test_one_task_chooses_as_fit_does(backbone: Backbone, tasks: dict[str, TaskData]) -> None:
    """With untrained weights both ways see the same model, so survey and calibration must agree to the bit."""
    data = tasks["digits"]
    single = _build("dbom", backbone, data.train, set())
    shared = _build("dbom", backbone, data.train, set())
    alone = fit(single, data.train, data.val, epochs=0)
    together, _ = fit_multitask(shared, {"digits": data}, epochs=0)
    for key, value in alone.metrics.items():
        if key.startswith("chosen/"):
            assert together.metrics[key] == value
    for key, tensor in single.trainable_state().items():
        assert torch.equal(shared.trainable_state()[key], tensor), key


@pytest.mark.parametrize("label_space", ["per_task", "joint_dedup"])
def test_masks_are_selected_on_all_tasks(
    label_space: Any, backbone: Backbone, tasks: dict[str, TaskData]
) -> None:
    """Selection by gradients looks at the training data of every task."""
    kind = LEARNERS.get("ramt").target
    data = tasks["digits"].train
    learner = kind(backbone, data.classnames, data.templates, select="top", select_count=2)
    learner.method = "ramt"
    result, _ = fit_multitask(learner, tasks, MultiTaskOptions(label_space=label_space), **RUN)
    assert len(learner.learned_parameters()) == 2
    assert "learned/masked_share" in result.metrics


@pytest.mark.parametrize("room", ["learners", "training", "meta", "classification"])
def test_no_method_is_looked_up_by_name(room: str) -> None:
    """Optional behaviour is a method of a base class, which the type checker sees."""
    wrong = []
    for path in sorted((PACKAGE / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id
            if called in ("getattr", "hasattr") and isinstance(node.args[1], ast.Constant):
                wrong.append(f"{path.name}:{node.lineno}")
    assert not wrong, wrong
