from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.training.toys import ToyModule, toy_batches
from vlprompt.core.errors import CheckpointError, NonFiniteError, VLPromptError
from vlprompt.core.files import read_tensors, write_tensors
from vlprompt.training.batches import epoch_plan
from vlprompt.training.callbacks import Callback, TrainingView
from vlprompt.training.options import TrainOptions
from vlprompt.training.schedule import learning_rate
from vlprompt.training.trainer import Trainer


def _train(folder: Path | None = None, resume: bool = False, dropout: float = 0.0, **options: Any) -> Trainer:
    checked = TrainOptions(**{"epochs": 6, "batch_size": 8, "lr": 0.1, **options})
    trainer = Trainer(ToyModule(dropout), toy_batches(checked), checked, folder, callbacks=[])
    trainer.run(resume)
    return trainer


def _state(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in trainer.module.trainable_state().items()}


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[n], b[n]) for n in a)


class _StopAt(Callback):
    """Raises after some optimiser steps, as a kill would."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def on_step(self, trainer: TrainingView, losses: dict[str, float]) -> None:
        self.left -= 1
        if self.left == 0:
            raise InterruptedError


def test_matches_a_loop_written_out_by_hand() -> None:
    options = TrainOptions(epochs=3, batch_size=8, lr=0.1)
    trainer = Trainer(ToyModule(), batches := toy_batches(options), options)
    history = trainer.run().history

    module = ToyModule()
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0, momentum=0.9, weight_decay=5e-4)
    for epoch in range(3):
        total = 0.0
        for step, indices in enumerate(batches.plan(epoch)):
            optimizer.param_groups[0]["lr"] = learning_rate(options, epoch, step, len(batches.plan(epoch)))
            loss = sum(module.loss(batches.fetch(indices, epoch)).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() / len(batches.plan(epoch))
        assert history[epoch]["loss"] == pytest.approx(total, rel=1e-5)
    assert _same(_state(trainer), module.trainable_state())


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_loss_falls(optimizer: str) -> None:
    history = _train(epochs=30, optimizer=optimizer, lr=0.1 if optimizer == "sgd" else 0.03).progress.history
    assert history[-1]["fit"] < 0.6 * history[0]["fit"]


@pytest.mark.parametrize("accumulation", [2, 3, 8])
def test_accumulation_does_not_change_the_result(accumulation: int) -> None:
    plain, split = _state(_train(drop_last=False)), _state(_train(drop_last=False, accumulation=accumulation))
    for name in plain:
        torch.testing.assert_close(plain[name], split[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("steps", [3, 6, 17])
def test_resume_is_bit_identical_wherever_it_was_stopped(tmp_path: Path, optimizer: str, steps: int) -> None:
    options = TrainOptions(epochs=6, batch_size=8, lr=0.05, optimizer=optimizer, checkpoint_seconds=0)
    whole = Trainer(ToyModule(0.3), toy_batches(options), options)
    history = whole.run().history

    stopped = Trainer(ToyModule(0.3), toy_batches(options), options, tmp_path, callbacks=[_StopAt(steps)])
    with pytest.raises(InterruptedError):
        stopped.run()
    resumed = Trainer(ToyModule(0.3, seed=9), toy_batches(options), options, tmp_path)
    assert resumed.run(resume=True).history == history
    assert _same(_state(resumed), _state(whole))


@pytest.mark.parametrize("steps", [9, 14, 29])
def test_resume_of_a_plateau_that_ends_early_is_bit_identical(tmp_path: Path, steps: int) -> None:
    options = TrainOptions(
        epochs=40, batch_size=16, lr=0.05, optimizer="adamw", checkpoint_seconds=0, schedule="plateau",
        plateau_patience=1, stop_patience=9, warmup_epochs=0,
    )  # fmt: skip

    def trainer(folder: Path | None, *callbacks: Callback, seed: int = 0) -> Trainer:
        made = Trainer(
            ToyModule(0.3, seed=seed), toy_batches(options), options, folder, lambda: {}, callbacks
        )
        made.validate = lambda: {"loss": float(np.random.default_rng(made.progress.epoch).normal())}
        return made

    whole = trainer(None)
    history = whole.run().history
    assert 10 < len(history) < 40
    assert len({record["lr"] for record in history}) > 3
    with pytest.raises(InterruptedError):
        trainer(tmp_path, _StopAt(steps)).run()
    resumed = trainer(tmp_path, seed=9)
    assert resumed.run(resume=True).history == history
    assert _same(_state(resumed), _state(whole))
    assert trainer(tmp_path, seed=5).run(resume=True).history == history  # it stays ended


def test_watching_needs_something_to_watch() -> None:
    for options in (TrainOptions(schedule="plateau"), TrainOptions(stop_patience=2)):
        with pytest.raises(VLPromptError, match="this run has none"):
            Trainer(ToyModule(), toy_batches(options), options)
        with pytest.raises(VLPromptError, match=r"monitor 'loss' is not validated; known: \['accuracy'\]"):
            Trainer(ToyModule(), toy_batches(options), options, validate=lambda: {"accuracy": 0.5}).run()


def test_resume_refuses_other_settings_and_names_them(tmp_path: Path) -> None:
    _train(tmp_path, lr=0.1)
    with pytest.raises(CheckpointError, match=r"options: checkpoint .*0\.1.* now .*0\.2"):
        _train(tmp_path, resume=True, lr=0.2)


def test_damaged_checkpoint_is_one_clear_error(tmp_path: Path) -> None:
    _train(tmp_path)
    file = tmp_path / "checkpoint" / "trainer.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(CheckpointError, match=r"trainer\.safetensors.*truncated"):
        _train(tmp_path, resume=True)


def test_a_flipped_bit_is_noticed_wherever_it_is(tmp_path: Path) -> None:
    whole = _train(tmp_path)
    file = tmp_path / "checkpoint" / "trainer.safetensors"
    data = file.read_bytes()
    rng = np.random.default_rng(0)
    messages: list[str] = []
    for place in rng.integers(0, len(data), 60):
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(rng.integers(8))
        file.write_bytes(bytes(flipped))
        try:
            again = _train(tmp_path, resume=True)
        except CheckpointError as error:
            messages.append(str(error))
        else:  # a bit of the padding
            assert _same(_state(again), _state(whole))
    assert len(messages) > 50
    assert all("trainer.safetensors" in message for message in messages)
    file.write_bytes(data)
    assert _same(_state(_train(tmp_path, resume=True)), _state(whole))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epoch", -3), ("epoch", 10**9), ("epoch", 1.5), ("epoch", None), ("epoch", True), ("step", -1),
        ("step", "x"), ("sums", []), ("sums", {"loss": None}), ("history", None), ("history", [1]),
        ("history", []), ("history", [{"epoch": 7}]), ("best", "high"), ("best_epoch", -1), ("seconds", -1.0),
        ("seconds", None),
    ],
)  # fmt: skip
def test_a_checkpoint_that_says_what_can_not_be_is_damaged(field: str, value: Any, tmp_path: Path) -> None:
    _train(tmp_path)
    path = tmp_path / "checkpoint" / "trainer.safetensors"
    tensors, metadata = read_tensors(path)
    metadata["progress"][field] = value
    write_tensors(path, tensors, metadata)  # whole, with the right checksum
    with pytest.raises(CheckpointError, match=r"trainer\.safetensors is damaged: "):
        _train(tmp_path, resume=True)


@pytest.mark.parametrize("key", ["progress", "identity", "optimizer", "scaler"])
@pytest.mark.parametrize("value", [None, [], 3, "x"])
def test_a_foreign_file_is_no_checkpoint(key: str, value: Any, tmp_path: Path) -> None:
    _train(tmp_path)
    path = tmp_path / "checkpoint" / "trainer.safetensors"
    tensors, metadata = read_tensors(path)
    write_tensors(path, tensors, {**metadata, key: value})
    with pytest.raises(CheckpointError, match=f"is not a trainer's checkpoint: it lacks '{key}'"):
        _train(tmp_path, resume=True)
    del metadata[key]
    write_tensors(path, tensors, metadata)
    with pytest.raises(CheckpointError, match="is not a trainer's checkpoint"):
        _train(tmp_path, resume=True)


def test_a_checkpoint_of_more_epochs_than_the_run_has(tmp_path: Path) -> None:
    _train(tmp_path)
    path = tmp_path / "checkpoint" / "trainer.safetensors"
    tensors, metadata = read_tensors(path)
    record = metadata["progress"]["history"][0]
    metadata["progress"]["epoch"] = 50
    metadata["progress"]["history"] = [{**record, "epoch": epoch} for epoch in range(50)]
    write_tensors(path, tensors, metadata)
    with pytest.raises(CheckpointError, match="is damaged: epoch is 50"):
        _train(tmp_path, resume=True)


def test_an_optimizer_of_other_parameters_is_damaged(tmp_path: Path) -> None:
    _train(tmp_path)
    path = tmp_path / "checkpoint" / "trainer.safetensors"
    tensors, metadata = read_tensors(path)
    for name, tensor in (("optimizer.9.momentum_buffer", torch.zeros(3)), ("optimizer.x.y", torch.zeros(1))):
        write_tensors(path, {**tensors, name: tensor}, metadata)
        with pytest.raises(CheckpointError, match="the optimiser's state does not fit"):
            _train(tmp_path, resume=True)


def test_the_best_epoch_needs_validation_data() -> None:
    options = TrainOptions(select="best")
    with pytest.raises(VLPromptError, match=r"this run has none\. Give it some, or write train\.select=last"):
        Trainer(ToyModule(), toy_batches(options), options)


def test_dropout_depends_on_the_seed_only() -> None:
    assert _same(_state(_train(dropout=0.3)), _state(_train(dropout=0.3)))
    assert not _same(_state(_train(dropout=0.3)), _state(_train(dropout=0.3, seed=2)))


def test_nan_loss_names_loss_and_step_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    options = TrainOptions(epochs=2, batch_size=8, checkpoint_seconds=0)
    batches = toy_batches(options)
    batches.tensors["x"][0][batches.plan(1)[2][0]] = float("nan")
    batches.plan(0)  # the poisoned sample is drawn in both epochs; find where it comes first
    first = next(i for i, part in enumerate(batches.plan(0)) if batches.plan(1)[2][0] in part)
    with pytest.raises(NonFiniteError, match=f"loss 'fit' is nan at epoch 0, step {first}"):
        Trainer(ToyModule(), batches, options, tmp_path).run()


def test_infinite_gradient_names_the_parameter() -> None:
    class Cliff(ToyModule):
        def loss(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {"root": (self.second * 0).abs().sum().sqrt()}  # value 0, slope infinite

    options = TrainOptions(epochs=1)
    with pytest.raises(NonFiniteError, match=r"gradient of 'second' is not finite at epoch 0, step 0"):
        Trainer(Cliff(), toy_batches(options), options).run()


def test_what_the_last_step_has_made_infinite_is_refused(tmp_path: Path) -> None:
    class Steep(ToyModule):
        def loss(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {"line": (self.second * 1e10).sum()}  # finite, and so is its slope

    options = TrainOptions(epochs=1, batch_size=100, lr=1e30, optimizer="sgd", warmup_epochs=0)
    batches = toy_batches(options)
    assert len(batches.plan(0)) == 1
    with pytest.raises(
        NonFiniteError, match=r"what 'second' has learned by the end of epoch 0 is not finite"
    ):
        Trainer(Steep(), batches, options, tmp_path).run()
    assert not (tmp_path / "checkpoint").exists()


def test_best_selection_keeps_the_earlier_of_ties() -> None:
    options = TrainOptions(epochs=4, batch_size=8, select="best", lr=0.1)
    scores = iter([0.2, 0.7, 0.7, 0.1])
    kept: list[dict[str, torch.Tensor]] = []
    trainer = Trainer(ToyModule(), toy_batches(options), options, validate=lambda: {"accuracy": next(scores)})

    class Keep(Callback):
        def on_epoch(self, trainer: TrainingView, record: dict[str, Any]) -> None:
            kept.append(_state(trainer))

    trainer.callbacks = [Keep()]
    progress = trainer.run()
    assert (progress.best, progress.best_epoch) == (0.7, 1)
    assert _same(_state(trainer), kept[1])
    assert not _same(kept[1], kept[3])


def test_unknown_selection_metric_lists_the_known_ones() -> None:
    options = TrainOptions(epochs=1, select="best", select_metric="f1")
    with pytest.raises(VLPromptError, match=r"'f1' is not validated; known: \['accuracy'\]"):
        Trainer(ToyModule(), toy_batches(options), options, validate=lambda: {"accuracy": 0.5}).run()


def test_gradient_clipping_bounds_the_step() -> None:
    options = TrainOptions(epochs=1, batch_size=50, lr=1.0, schedule="constant", warmup_epochs=0,
                           momentum=0.0, weight_decay=0.0, grad_clip=1e-3)  # fmt: skip
    trainer = Trainer(ToyModule(), toy_batches(options), options)
    before = torch.cat([t.flatten() for t in _state(trainer).values()])
    trainer.run()
    after = torch.cat([t.flatten() for t in _state(trainer).values()])
    assert float((after - before).norm()) == pytest.approx(1e-3, rel=1e-3)


def test_nothing_to_learn_is_an_error() -> None:
    options = TrainOptions()
    with pytest.raises(VLPromptError, match="no learnable parameter"):
        Trainer(ToyModule().requires_grad_(False), toy_batches(options), options)


def test_epoch_plan_covers_every_sample_once_and_depends_on_seed_and_epoch() -> None:
    plan = epoch_plan(53, 8, seed=1, epoch=0, drop_last=False)
    assert sorted(np.concatenate(plan).tolist()) == list(range(53))
    assert len(epoch_plan(53, 8, 1, 0)) == 6  # the incomplete batch is dropped
    assert len(epoch_plan(5, 8, 1, 0)) == 1  # but never the only one
    assert np.array_equal(np.concatenate(plan), np.concatenate(epoch_plan(53, 8, 1, 0, False)))
    assert not np.array_equal(np.concatenate(plan), np.concatenate(epoch_plan(53, 8, 1, 1, False)))
    assert not np.array_equal(np.concatenate(plan), np.concatenate(epoch_plan(53, 8, 2, 0, False)))


class _Summing(ToyModule):
    """Combines the gradients of its losses by adding them, which is what one backward pass does."""

    combines_gradients = True

    def combine_gradients(self, gradients: dict[str, list[torch.Tensor]]) -> list[torch.Tensor]:
        assert set(gradients) == {"fit", "size"}
        return [a + b for a, b in zip(*gradients.values(), strict=True)]


@pytest.mark.parametrize("accumulation", [1, 3])
def test_separate_gradients_added_up_equal_one_backward_pass(accumulation: int) -> None:
    options = TrainOptions(epochs=4, batch_size=8, lr=0.1, accumulation=accumulation)
    module = _Summing()
    Trainer(module, toy_batches(options), options).run()
    plain = _state(_train(epochs=4, accumulation=accumulation))
    for name, value in module.trainable_state().items():
        torch.testing.assert_close(value, plain[name], rtol=1e-5, atol=1e-6)


class _Averaging(ToyModule):
    """Ends with the mean of its weights over epochs."""

    def __init__(self, dropout: float = 0.0, seed: int = 0) -> None:
        super().__init__(dropout, seed)
        self.sums = {n: torch.zeros_like(p) for n, p in self.named_parameters()}

    def after_epoch(self, epoch: int, epochs: int) -> None:
        for name, parameter in self.named_parameters():
            self.sums[name] += parameter.detach() / epochs

    def after_training(self) -> None:
        self.load_trainable_state(self.sums)

    def running_state(self) -> dict[str, torch.Tensor]:
        return self.sums

    def load_running_state(self, state: dict[str, torch.Tensor]) -> None:
        self.sums = dict(state)


def test_averages_over_epochs_survive_a_stop(tmp_path: Path) -> None:
    options = TrainOptions(epochs=5, batch_size=8, lr=0.1, checkpoint_seconds=0)
    whole = Trainer(_Averaging(0.2), toy_batches(options), options)
    whole.run()
    stopped = Trainer(_Averaging(0.2), toy_batches(options), options, tmp_path, callbacks=[_StopAt(15)])
    with pytest.raises(InterruptedError):
        stopped.run()
    resumed = Trainer(_Averaging(0.2), toy_batches(options), options, tmp_path)
    resumed.run(resume=True)
    assert _same(_state(resumed), _state(whole))
    assert not _same(_state(whole), _state(_train(epochs=5, dropout=0.2)))


def _in_float16(module: type[ToyModule]) -> type[ToyModule]:
    class Half(module):  # type: ignore[misc, valid-type]
        precision = "fp16"

        def loss(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {name: _Narrow.apply(value) for name, value in super().loss(batch).items()}

    return Half


class _Narrow(torch.autograd.Function):
    """The identity; its gradient passes float16 at 1e-8 of its size, which is less than float16's smallest number."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return (1e-8 * gradients[0]).half().float() * 1e8


@pytest.mark.parametrize("module", [ToyModule, _Summing])
def test_float16_scales_and_unscales(module: type[ToyModule]) -> None:
    """The gradient passes a place where float16 rounds it to zero unless the loss is scaled."""
    options = TrainOptions(epochs=4, batch_size=8, lr=0.1)
    half = _in_float16(module)()
    Trainer(half, toy_batches(options), options).run()
    whole = _state(_train(epochs=4))
    for name, value in half.trainable_state().items():
        torch.testing.assert_close(value, whole[name], rtol=2e-2, atol=2e-3)
