"""What holds for every plug-in over every learner it can stand on; and what is refused, with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from vlprompt import create_learner, evaluate, fit, load, load_dataset, save
from vlprompt.backbones import Backbone
from vlprompt.classification.learner_section import learner_arguments, learner_problems
from vlprompt.classification.multitask import TaskData, fit_multitask
from vlprompt.classification.transfer import start_from
from vlprompt.core.errors import CheckpointError, ConfigError, DataError
from vlprompt.learners import LEARNERS, Learner
from vlprompt.learners.hooks import overridden_hooks
from vlprompt.learners.plugins import PLUGINS, Plugin
from vlprompt.training.callbacks import Callback, TrainingView
from vlprompt.training.options import TrainOptions
from vlprompt.training.trainer import Trainer

NAMES = ("dog", "red circle", "hummingbird")
NEW = ("tulip", "dog")
STANDS_ON = [
    "clip_lora",
    "coop",
    "coprompt",
    "dept",
    "ept",
    "ivlp",
    "kgcoop",
    "lasp",
    "maple",
    "mma",
    "mmrl",
    "mvlpt",
    "prograd",
    "promptsrc",
    "tcp",
    "upt",
]
REFUSED = [name for name in LEARNERS.names() if name not in STANDS_ON]


@pytest.fixture
def batch(images: Tensor) -> dict[str, Tensor]:
    return {"image": images, "label": torch.arange(6) % 3, "index": torch.arange(6)}


def disturbed(learner: Learner) -> Learner:
    """Move everything learned away from its start, as training would."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in learner.learned_parameters().values():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return learner.eval()


@pytest.mark.parametrize("entry", list(PLUGINS), ids=lambda entry: entry.name)
def test_says_what_it_is(entry: object) -> None:
    assert 10 <= len(entry.summary) <= 80  # type: ignore[attr-defined]
    assert entry.paper  # type: ignore[attr-defined]
    assert entry.target.plugin == entry.name  # type: ignore[attr-defined]


@pytest.mark.parametrize("plugin", PLUGINS.names())
@pytest.mark.parametrize("name", STANDS_ON)
def test_over_every_learner_it_can_stand_on(
    name: str, plugin: str, backbone: Backbone, images: Tensor, batch: dict[str, Tensor], tmp_path: Path
) -> None:
    """Losses, gradients, other classes, saving and what belongs to the learner inside."""
    learner = create_learner(name, backbone, NAMES, plugins=[plugin]).train()
    assert isinstance(learner, Plugin)
    losses = learner.loss(batch)
    torch.stack(list(losses.values())).sum().backward()
    own = learner.learned_parameters()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in own.values())
    assert {key.removeprefix("inner.") for key in own if key.startswith("inner.")} == set(
        learner.inner.learned_parameters()
    )
    assert all(p.grad is None for p in backbone.parameters())

    disturbed(learner)
    save(learner, tmp_path)
    other = load(tmp_path, backbone)
    with torch.no_grad():
        logits = learner(images)
        assert torch.equal(other(images), logits)
        torch.testing.assert_close(learner.logits(learner.embed_images(images)), logits)
        again = learner.with_classes(NAMES[::-1])
        torch.testing.assert_close(again(images), logits.flip(1), rtol=0, atol=1e-4)
        new = learner.with_classes(NEW)
        assert new(images).shape == (6, 2)
        inside = learner.inner.with_classes(NEW)
        if plugin != "text_refiner":  # which has no head: what it learned names new classes too
            torch.testing.assert_close(new(images), inside(images), rtol=0, atol=1e-4)
        back = new.with_classes(NAMES)
        assert torch.equal(back(images), logits)

    state = dict(learner.trainable_state())
    with pytest.raises(CheckpointError, match=f"fit {name} with {plugin}: .*foreign is unknown"):
        learner.load_trainable_state({**state, "foreign": torch.zeros(1)})


@pytest.mark.parametrize("plugin", PLUGINS.names())
@pytest.mark.parametrize("name", REFUSED)
def test_the_others_are_refused_with_the_reason(name: str, plugin: str, backbone: Backbone) -> None:
    with pytest.raises(DataError, match=f"the plug-in {plugin} can't stand on {name}: it "):
        create_learner(name, backbone, NAMES, plugins=[plugin])


def test_one_family_of_a_learner_is_refused_where_another_is_not(backbone: Backbone) -> None:
    create_learner("clip_lora", backbone, NAMES, plugins=["dept"], encoder="text")
    with pytest.raises(DataError, match="clip_lora: it learns nothing in the text tower"):
        create_learner("clip_lora", backbone, NAMES, plugins=["dept"], encoder="vision")


def test_mistakes_are_named_all_at_once() -> None:
    rows = [{"name": "dpt"}, {"name": "dept", "wieght": 0.5}, {"weight": 1}, "dpc", {"name": "dpc"}]
    problems = learner_problems({"name": "coop", "context": 4, "with": rows})
    text = " ".join(problems)
    assert "learner.context: unknown key" in text
    assert "learner.with.0.name: unknown plugin 'dpt'" in text
    assert "did you mean 'weight'" in text
    assert "learner.with.2: name and options of a plug-in" in text
    assert "learner.with.4.name: dpc is named twice" in text
    with pytest.raises(ConfigError, match="a list of plug-ins"):
        create_learner("coop", None, NAMES, plugins={"name": "dept"})  # type: ignore[arg-type]


def test_plug_ins_stand_in_one_order(backbone: Backbone) -> None:
    learner = create_learner("coop", backbone, NAMES, plugins=["dpc", "dept"])
    assert learner.layers() == ["dept", "dpc"]  # type: ignore[attr-defined]
    assert learner.title() == "coop with dept with dpc"
    assert learner.method == "coop"


def test_a_configuration_seeds_the_learner_and_its_plug_ins() -> None:
    arguments = learner_arguments({"name": "coop", "with": ["dept", {"name": "dpc", "choices": 2}]}, seed=5)
    assert arguments == {
        "seed": 5,
        "plugins": [{"seed": 5, "name": "dept"}, {"name": "dpc", "choices": 2}],
    }


def test_every_hook_of_the_learner_inside_is_asked(backbone: Backbone, batch: dict[str, Tensor]) -> None:
    """ProGrad combines the gradients of its losses: with a head of weight 0 around it, the step is its own."""
    inside = create_learner("prograd", backbone, NAMES)
    around = create_learner("prograd", backbone, NAMES, plugins=[{"name": "dept", "weight": 0.0}])
    assert around.combines_gradients
    assert "combine_gradients" in overridden_hooks(type(inside))

    class Once:
        def plan(self, epoch: int) -> list[object]:
            return [torch.arange(6).numpy()]

        def fetch(self, indices: object, epoch: int) -> dict[str, Tensor]:
            return dict(batch)

    for learner in (inside, around):
        Trainer(learner, Once(), TrainOptions(epochs=3, lr=0.01, weight_decay=0), callbacks=[]).run()  # type: ignore[arg-type]
    assert torch.equal(around.inner.context, inside.context)  # type: ignore[attr-defined]


def test_what_names_parameters_names_those_inside(backbone: Backbone) -> None:
    inside = create_learner("lasp", backbone, NAMES, plugins=["dept"])
    groups = inside.parameter_groups()
    assert sorted(name for group in groups for name in group["names"]) == sorted(inside.learned_parameters())
    rates = {name: group.get("rate", 1.0) for group in groups for name in group["names"]}
    assert rates["inner.context"] == 1.0
    assert rates["head.weight"] == 6.5


def test_tasks_can_t_share_a_head_nor_confusable_classes(backbone: Backbone) -> None:
    data = {name: TaskData(load_dataset(name, "train", shots=1)) for name in ("scenes/shape", "digits")}
    for plugin, reason in (
        ("dept", "one set of values per class"),
        ("dpc", "confusable classes from one task"),
    ):
        learner = create_learner("coop", backbone, NAMES, plugins=[plugin])
        with pytest.raises(DataError, match=reason):
            fit_multitask(learner, data, epochs=1)


def test_a_target_starts_from_what_was_saved(backbone: Backbone, tmp_path: Path) -> None:
    options = {"plugins": [{"name": "dpc", "choices": 3}]}
    learner = disturbed(create_learner("coop", backbone, NAMES, **options, seed=2))
    save(learner, tmp_path)
    other = create_learner("coop", backbone, NEW, **options)
    start_from(other, [tmp_path])
    assert torch.equal(other.inner.context, learner.inner.context)  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match="option plugins is"):
        start_from(create_learner("coop", backbone, NEW), [tmp_path])


@pytest.mark.parametrize("plugin", PLUGINS.names())
def test_a_killed_training_goes_on(plugin: str, backbone: Backbone, tmp_path: Path) -> None:
    data = load_dataset("digits", "train", shots=2, seed=1)
    whole = create_learner("kgcoop", backbone, data.classnames, plugins=[plugin])
    options = {"epochs": 4, "lr": 0.01, "batch_size": 8, "callbacks": (), "views": 1}
    fit(whole, data, **options)  # type: ignore[arg-type]

    class KilledError(Exception):
        pass

    class Kill(Callback):
        def on_epoch(self, trainer: TrainingView, record: dict[str, object]) -> None:
            if trainer.progress.epoch == 3:
                raise KilledError

    for calls in ((Kill(),), ()):
        cut = create_learner("kgcoop", backbone, data.classnames, plugins=[plugin])
        try:
            fit(
                cut,
                data,
                folder=tmp_path,
                resume=True,
                **{**options, "callbacks": calls, "checkpoint_seconds": 0},
            )  # type: ignore[arg-type]
        except KilledError:
            continue
    assert all(torch.equal(cut.trainable_state()[k], t) for k, t in whole.trainable_state().items())
    assert evaluate(cut, data) == evaluate(whole, data)
