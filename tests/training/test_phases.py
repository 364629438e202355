"""Runs that are counted in steps, and runs in phases: each with an optimiser and a schedule of its own."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.training.toys import ToyModule, toy_batches
from vlprompt import create_learner, fit, load_dataset
from vlprompt.backbones import Backbone
from vlprompt.core.errors import ConfigError, VLPromptError
from vlprompt.core.trainable import Phase
from vlprompt.training.callbacks import Callback, TrainingView
from vlprompt.training.options import TrainOptions
from vlprompt.training.phases import Span, span_at, spans_of
from vlprompt.training.schedule import learning_rate
from vlprompt.training.trainer import Trainer


class TwoPhases(ToyModule):
    """Trains its first layer, then its second, which the border doubles."""

    def __init__(self, dropout: float = 0.0, seed: int = 0) -> None:
        super().__init__(dropout, seed)
        self.entered: list[tuple[int, bool]] = []

    def phases(self) -> list[Phase]:
        return [Phase(("first",), 0.6), Phase(("second",), 0.4)]

    @torch.no_grad()
    def enter_phase(self, number: int, is_new: bool) -> None:
        self.entered.append((number, is_new))
        if number == 1 and is_new:
            self.second.mul_(2)


class Watch(Callback):
    """Keeps every step's rate and what moved; raises after some steps, as a kill would."""

    def __init__(self, stop: int | None = None) -> None:
        self.stop = stop
        self.rates: list[float] = []
        self.moved: list[set[str]] = []
        self.before: dict[str, Tensor] = {}

    def on_step(self, trainer: TrainingView, losses: dict[str, float]) -> None:
        now = {name: tensor.clone() for name, tensor in trainer.module.trainable_state().items()}
        if self.before:
            self.moved.append({name for name in now if not torch.equal(now[name], self.before[name])})
        self.before = now
        self.rates.append(trainer.optimizer.param_groups[0]["lr"])
        if self.stop is not None and len(self.rates) == self.stop:
            raise InterruptedError


def test_the_last_epoch_ends_where_the_steps_do() -> None:
    options = TrainOptions(steps=16, batch_size=8, schedule="cosine", warmup_epochs=0, final_lr=1e-6, lr=0.1)
    watch = Watch()
    trainer = Trainer(ToyModule(), toy_batches(options), options, callbacks=[watch])  # 6 steps an epoch
    assert [record["epoch"] for record in trainer.run().history] == [0, 1, 2]
    assert trainer.options.epochs == 3
    # PyTorch's own schedule over 16 steps.
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 16, eta_min=1e-6)
    expected = []
    for _ in range(16):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert watch.rates == pytest.approx(expected, rel=1e-9)


def test_steps_that_fill_whole_epochs_are_those_epochs() -> None:
    by_epochs = TrainOptions(epochs=3, batch_size=8, lr=0.1)
    by_steps = TrainOptions(steps=18, batch_size=8, lr=0.1)
    states = []
    for options in (by_epochs, by_steps):
        trainer = Trainer(ToyModule(), toy_batches(options), options, callbacks=[])
        trainer.run()
        states.append(trainer.module.trainable_state())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_steps_per_shot_count_the_largest_class(backbone: Backbone) -> None:
    data = load_dataset("digits", "train", shots=3, seed=1)
    data = data.subset(i for i in range(len(data)) if i != data.labels.index(4))  # a class with two
    learner = create_learner("coop", backbone, data.classnames, context_length=2)
    result = fit(learner, data, steps_per_shot=2, batch_size=10, callbacks=[])
    assert len(result.history) == math.ceil(6 / 2)  # 29 samples are 2 whole batches


def test_lengths_that_contradict_or_can_t_be_counted_are_refused() -> None:
    with pytest.raises(ValueError, match="steps and steps_per_shot both say how long"):
        TrainOptions(steps=3, steps_per_shot=2)
    options = TrainOptions(steps_per_shot=2)
    with pytest.raises(VLPromptError, match=r"Use train\.steps or train\.epochs"):
        Trainer(ToyModule(), toy_batches(options), options)
    learner_options = {"steps": 2, "steps_per_shot": 1}
    with pytest.raises(ConfigError, match="steps_per_shot"):
        fit(None, None, **learner_options)  # type: ignore[arg-type]  # refused before it is looked at


def test_spans_are_rounded_down_and_the_last_has_the_rest() -> None:
    phases = [Phase(("a",), 0.6), Phase(("b",), 0.4)]
    assert spans_of(phases, 4801) == [Span(0, 0, 2880, frozenset("a")), Span(1, 2880, 1921, frozenset("b"))]
    assert spans_of([], 7) == [Span(0, 0, 7)]
    # A phase that has no step is left out.
    assert span_at(spans_of(phases, 1), 0).number == 1


def test_a_phase_moves_its_parameters_alone_with_a_schedule_of_its_own() -> None:
    options = TrainOptions(
        steps=20,
        batch_size=8,
        lr=0.1,
        optimizer="adamw",
        weight_decay=0.1,
        schedule="cosine",
        warmup_epochs=0,
    )
    watch = Watch()
    module = TwoPhases()
    Trainer(module, toy_batches(options), options, callbacks=[watch]).run()
    assert module.entered == [(0, True), (1, True)]
    assert watch.moved[:11] == [{"first"}] * 11
    assert watch.moved[12:] == [{"second"}] * 7
    of_first = TrainOptions(steps=12, lr=0.1, schedule="cosine", warmup_epochs=0)
    of_second = TrainOptions(steps=8, lr=0.1, schedule="cosine", warmup_epochs=0)
    expected = [learning_rate(of_first, 0, i, 100) for i in range(12)]
    expected += [learning_rate(of_second, 0, i, 100) for i in range(8)]
    assert watch.rates == pytest.approx(expected)


def test_phases_equal_two_optimisers_one_after_the_other() -> None:
    options = TrainOptions(
        steps=10,
        batch_size=8,
        lr=0.05,
        optimizer="adamw",
        weight_decay=0.1,
        schedule="constant",
        warmup_epochs=0,
    )
    trained = TwoPhases()
    batches = toy_batches(options)
    Trainer(trained, batches, options, callbacks=[]).run()

    module = TwoPhases()
    samples = [(epoch, part) for epoch in range(2) for part in batches.plan(epoch)][:10]
    for number, steps in ((0, samples[:6]), (1, samples[6:])):
        module.enter_phase(number, True)
        own = [module.first, module.second][number]
        optimizer = torch.optim.AdamW([own], lr=0.05, weight_decay=0.1)
        for epoch, part in steps:
            loss = sum(module.loss(batches.fetch(part, epoch)).values())
            (own.grad,) = torch.autograd.grad(loss, [own])
            optimizer.step()
    assert torch.equal(module.first, trained.first)
    assert torch.equal(module.second, trained.second)


@pytest.mark.parametrize("steps", [3, 12, 13, 17])
def test_a_resume_in_a_phase_or_at_its_border_is_bit_identical(tmp_path: Path, steps: int) -> None:
    options = TrainOptions(steps=20, batch_size=8, lr=0.05, optimizer="adamw", checkpoint_seconds=0)
    whole = TwoPhases(0.3)
    history = Trainer(whole, toy_batches(options), options, callbacks=[]).run().history

    with pytest.raises(InterruptedError):
        Trainer(TwoPhases(0.3), toy_batches(options), options, tmp_path, callbacks=[Watch(steps)]).run()
    resumed = TwoPhases(0.3, seed=9)
    assert (
        Trainer(resumed, toy_batches(options), options, tmp_path, callbacks=[]).run(True).history == history
    )
    assert torch.equal(resumed.first, whole.first)
    assert torch.equal(resumed.second, whole.second)
