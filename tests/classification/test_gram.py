"""Starting from meta-learned prompts: what is put where, what the regulator does to a step, what is refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vlprompt import create_adapter, create_learner, fit, load, load_dataset
from vlprompt.backbones import Backbone
from vlprompt.classification.multitask import TaskData, fit_multitask
from vlprompt.core.errors import CheckpointError, DataError, UnknownNameError
from vlprompt.core.files import read_tensors, write_tensors
from vlprompt.data import ImageDataset
from vlprompt.learners import Learner
from vlprompt.meta.functional import prompt_shapes
from vlprompt.meta.regulated import Regulated
from vlprompt.meta.regulators import PROMPTS, Regulator, Situation, create_regulator
from vlprompt.meta.start import read_start, save_start
from vlprompt.training.batches import TensorBatches
from vlprompt.training.options import TrainOptions
from vlprompt.training.trainer import Trainer

NAMES = ("dog", "red circle")
SIZES: dict[str, dict[str, Any]] = {
    "coop": {"context_length": 3},
    "vpt": {"visual_length": 2, "visual_depth": 2},
}
QUIET: dict[str, Any] = {"callbacks": [], "epochs": 2, "batch_size": 4, "lr": 0.05}


@pytest.fixture(scope="module")
def data() -> ImageDataset:
    return load_dataset("scenes/kind", "train", shots=3, seed=1)


def _start(
    backbone: Backbone, folder: Path, learner: str = "coop", regulator: str = "identity", **options: Any
) -> tuple[Learner, Regulator]:
    """Write a start whose prompts and regulator are nobody's initial values."""
    sizes = {**SIZES.get(learner, {}), **options}
    held = create_learner(learner, backbone, NAMES, **sizes)
    found = create_regulator(regulator, prompt_shapes(held, PROMPTS), backbone.dim)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in [*(p for p in held.parameters() if p.requires_grad), *found.parameters()]:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    save_start(held, found, folder, {"seed": 1})
    return held, found


def _coop(backbone: Backbone, data: ImageDataset, **options: Any) -> Learner:
    return create_learner("coop", backbone, data.classnames, **{**SIZES["coop"], **options})


def _states(ours: Learner, theirs: Learner) -> list[tuple[Tensor, Tensor]]:
    return [(t, theirs.trainable_state()[n]) for n, t in ours.trainable_state().items()]


def test_what_is_read_is_what_was_written(backbone: Backbone, tmp_path: Path) -> None:
    held, regulator = _start(backbone, tmp_path / "prompt", regulator="low_rank")
    start = read_start(f"gram:{tmp_path}")  # a run's folder means its prompt
    assert torch.equal(start.prompts["context"], held.context)
    gradients = {"context": torch.randn(3, 64, generator=torch.Generator().manual_seed(1))}
    with torch.no_grad():
        expected = regulator(gradients, Situation())["context"]
    assert torch.equal(start.regulator(gradients, Situation())["context"], expected)
    assert not any(p.requires_grad for p in start.regulator.parameters())
    assert start.facts == {"seed": 1}
    assert torch.equal(
        load(tmp_path / "prompt", backbone).context, held.context
    )  # and prompts like any others


def test_without_a_regulator_it_is_training_from_these_prompts(
    backbone: Backbone, data: ImageDataset, tmp_path: Path
) -> None:
    held, _ = _start(backbone, tmp_path)
    ours, theirs = _coop(backbone, data), _coop(backbone, data)
    theirs.load_trainable_state(held.trainable_state())
    fit(ours, data, init=f"gram:{tmp_path}", **QUIET)
    fit(theirs, data, **QUIET)
    assert all(torch.equal(a, b) for a, b in _states(ours, theirs))


def test_a_factor_of_two_is_twice_the_learning_rate(
    backbone: Backbone, data: ImageDataset, tmp_path: Path
) -> None:
    held, regulator = _start(backbone, tmp_path, regulator="diagonal")
    with torch.no_grad():
        regulator.scale["context"].fill_(2.0)
    save_start(held, regulator, tmp_path, {})
    ours, theirs = _coop(backbone, data), _coop(backbone, data)
    theirs.load_trainable_state(held.trainable_state())
    plain = {**QUIET, "weight_decay": 0.0, "schedule": "constant", "warmup_epochs": 0}
    fit(ours, data, init=f"gram:{tmp_path}", **plain)
    fit(theirs, data, **{**plain, "lr": 0.1})
    for a, b in _states(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_gradients_are_clipped_before_they_are_regulated(
    backbone: Backbone, data: ImageDataset, tmp_path: Path
) -> None:
    """One step by hand: clip to a norm, regulate, plain gradient descent."""
    held, regulator = _start(backbone, tmp_path, regulator="low_rank")
    learner = _coop(backbone, data)
    read_start(f"gram:{tmp_path}").put_into(learner)
    batch = {
        "embedding": torch.randn(4, 48, generator=torch.Generator().manual_seed(3)),
        "label": torch.tensor([0, 1, 1, 0]),
    }
    loss = sum(learner.loss(batch).values())
    (gradient,) = torch.autograd.grad(loss, learner.context)
    gradient = gradient * (0.01 / gradient.norm())
    with torch.no_grad():
        expected = held.context - 0.5 * regulator({"context": gradient}, Situation())["context"]
    options = TrainOptions(
        epochs=1,
        batch_size=4,
        lr=0.5,
        momentum=0,
        weight_decay=0,
        grad_clip=0.01,
        schedule="constant",
        warmup_epochs=0,
    )
    batches = TensorBatches({n: [t] for n, t in batch.items()}, 4, 1)
    Trainer(Regulated(learner, regulator), batches, options).run()
    torch.testing.assert_close(learner.context, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("regulator", ["gated", "two_gradients"])
@pytest.mark.parametrize("name", ["coop", "vpt"])
def test_regulators_that_must_know_more_are_told(
    name: str, regulator: str, backbone: Backbone, data: ImageDataset, tmp_path: Path
) -> None:
    """The first step moves prompts by what the regulator makes of both gradients."""
    _start(backbone, tmp_path, name, regulator)
    start = read_start(f"gram:{tmp_path}")
    learner = create_learner(name, backbone, data.classnames, **SIZES[name])
    rates = {"lr": 0.01, "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant", "warmup_epochs": 0}
    fit(learner, data, init=f"gram:{tmp_path}", callbacks=[], epochs=1, batch_size=6, **rates)

    other = create_learner(name, backbone, data.classnames, **SIZES[name]).train()
    start.put_into(other)
    pixels = torch.stack([backbone.preprocess(data[i][0]) for i in range(6)])
    features = backbone.encode_image(pixels)
    batch = {"label": torch.tensor(data.labels), "image": pixels}
    parameters = dict(other.named_parameters())
    names = list(start.prompts)
    losses = [sum(other.loss(batch).values())]
    losses += [start.regulator.distance(other, batch)] if regulator == "two_gradients" else []
    found = [
        dict(
            zip(
                names,
                torch.autograd.grad(loss, [parameters[n] for n in names], allow_unused=True),
                strict=True,
            )
        )
        for loss in losses
    ]
    mean = torch.nn.functional.normalize(features.mean(0), dim=-1)
    regulated = start.regulator(found[0], Situation(mean, found[1] if len(found) > 1 else None))
    for prompt in names:
        expected = start.prompts[prompt] - 0.01 * regulated[prompt]
        torch.testing.assert_close(learner.get_parameter(prompt), expected, rtol=1e-3, atol=1e-5)


def test_adam_takes_factors_back_and_says_so(backbone: Backbone, data: ImageDataset, tmp_path: Path) -> None:
    _start(backbone, tmp_path, regulator="diagonal")
    with pytest.warns(UserWarning, match="'diagonal' cancel"):
        fit(_coop(backbone, data), data, init=f"gram:{tmp_path}", optimizer="adamw", **QUIET)
    _start(backbone, tmp_path, regulator="low_rank")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fit(_coop(backbone, data), data, init=f"gram:{tmp_path}", optimizer="adamw", **QUIET)


@pytest.mark.parametrize("name", ["kgcoop", "cocoop", "prograd"])
def test_methods_that_learn_the_same_kind_of_prompt_share_starts(
    name: str, backbone: Backbone, data: ImageDataset, tmp_path: Path
) -> None:
    held, _ = _start(backbone, tmp_path, regulator="low_rank")
    options = {"init": ""} if name != "prograd" else {}
    learner = create_learner(name, backbone, data.classnames, context_length=3, **options)
    assert "context" in read_start(f"gram:{tmp_path}").put_into(learner)
    assert torch.equal(learner.context, held.context)
    fit(learner, data, init=f"gram:{tmp_path}", **QUIET)
    assert not torch.equal(learner.context, held.context)


def test_text_and_visual_prompts_together(backbone: Backbone, data: ImageDataset, tmp_path: Path) -> None:
    """UNIGRAM: one start for both towers, a regulator for each."""
    options: dict[str, Any] = {"family": "upt", "mixer": "identity", "visual_depth": 2}
    held, regulator = _start(backbone, tmp_path, "mvlpt", "diagonal", **options)
    assert set(regulator.shapes) == {"context", "visual"}
    learner = create_learner("mvlpt", backbone, data.classnames, **options)
    fit(learner, data, init=f"gram:{tmp_path}", **QUIET)
    for prompt in ("context", "visual"):
        assert not torch.equal(learner.get_parameter(prompt), held.get_parameter(prompt))


def test_several_tasks_start_from_it_too(backbone: Backbone, data: ImageDataset, tmp_path: Path) -> None:
    held, _ = _start(backbone, tmp_path)
    other = load_dataset("scenes/arrangement", "train", shots=3, seed=1)
    tasks = {"kind": TaskData(data), "arrangement": TaskData(other)}
    ours, theirs = _coop(backbone, data), _coop(backbone, data)
    theirs.load_trainable_state(held.trainable_state())
    fit_multitask(ours, tasks, init=f"gram:{tmp_path}", **QUIET)
    fit_multitask(theirs, tasks, **QUIET)
    assert all(torch.equal(a, b) for a, b in _states(ours, theirs))


@pytest.mark.parametrize("regulator", ["identity", "low_rank"])
def test_it_is_a_start_for_test_time_tuning(
    regulator: str, backbone: Backbone, images: Tensor, tmp_path: Path
) -> None:
    """TPT by plain gradient descent with the regulator on every image's own gradient."""
    _, held = _start(backbone, tmp_path, regulator=regulator)
    start = read_start(f"gram:{tmp_path}")
    learner = _coop(backbone, load_dataset("scenes/kind"))
    start.put_into(learner)
    options: dict[str, Any] = {"views": 4, "share": 0.5, "lr": 0.5, "optimizer": "sgd"}
    plain = create_adapter("tpt", learner, **options)
    regulated = create_adapter("tpt", learner, transform=start.transform(), **options)
    rows = {"context": torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))}
    with torch.no_grad():
        by_row = torch.stack([held({"context": row}, Situation())["context"] for row in rows["context"]])
    torch.testing.assert_close(start.transform()(rows)["context"], by_row)
    same = torch.equal(plain.predict(images[:2]).probs, regulated.predict(images[:2]).probs)
    assert same == (regulator == "identity")


def test_a_regulator_that_reads_images_is_refused_at_test_time(backbone: Backbone, tmp_path: Path) -> None:
    _start(backbone, tmp_path, regulator="gated")
    with pytest.raises(DataError, match="identity, diagonal and low_rank can"):
        read_start(f"gram:{tmp_path}").transform()


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("coop", {"context_length": 5}, r"its context has shape \(5, 64\), the meta-learned one \(3, 64\)"),
        (
            "coop",
            {"context_length": 3, "position": "front"},
            "its position is 'front', in meta-training it was 'end'",
        ),
        ("vpt", {}, "it has no context"),
    ],
)
def test_a_learner_it_does_not_fit_is_told_why(
    method: str, options: dict[str, Any], message: str, backbone: Backbone, data: ImageDataset, tmp_path: Path
) -> None:
    _start(backbone, tmp_path)
    learner = create_learner(method, backbone, data.classnames, **options)
    with pytest.raises(CheckpointError, match=message):
        fit(learner, data, init=f"gram:{tmp_path}", **QUIET)


def test_another_backbone_is_refused(
    make_backbone: Any, backbone: Backbone, data: ImageDataset, tmp_path: Path
) -> None:
    _start(backbone, tmp_path)
    with pytest.raises(CheckpointError, match="backbone"):
        fit(_coop(make_backbone(seed=5), data), data, init=f"gram:{tmp_path}", **QUIET)


def test_what_is_no_start_is_explained(backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="Saved prompts alone"):
        read_start("runs/somewhere")
    with pytest.raises(CheckpointError, match="no saved prompt"):
        read_start(f"gram:{tmp_path}/nowhere")
    _start(backbone, tmp_path / "a")
    _start(backbone, tmp_path / "b", regulator="diagonal")
    with pytest.raises(CheckpointError, match="means 2 saved prompts"):
        read_start(f"gram:{tmp_path}/*")
    tensors, metadata = read_tensors(tmp_path / "b" / "regulator.safetensors")
    _start(backbone, tmp_path / "c", seed=9)
    # The files of two starts were mixed up.
    write_tensors(tmp_path / "c" / "regulator.safetensors", tensors, metadata)
    with pytest.raises(CheckpointError, match="belongs to other prompts"):
        read_start(f"gram:{tmp_path}/c")
    write_tensors(tmp_path / "c" / "regulator.safetensors", {}, metadata)
    with pytest.raises(CheckpointError, match="is damaged"):
        read_start(f"gram:{tmp_path}/c")
    (tmp_path / "c" / "regulator.safetensors").unlink()
    with pytest.raises(CheckpointError, match="not meta-learned"):
        read_start(f"gram:{tmp_path}/c")
