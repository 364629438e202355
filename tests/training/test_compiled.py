"""``train.compile``: compiled training gives the numbers of training without it; without a compiler the run goes on."""

from __future__ import annotations

import logging
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor

import vlprompt
from vlprompt.training.compiled import CompiledLoss

OPTIONS: dict[str, Any] = {"epochs": 3, "batch_size": 8, "lr": 0.02, "seed": 1}


def learned(name: str, compiled: bool) -> dict[str, Tensor]:
    backbone = vlprompt.create_backbone("tiny")
    train = vlprompt.load_dataset("scenes/size", shots=4, seed=1)
    learner = vlprompt.create_learner(name, backbone, train.classnames)
    vlprompt.fit(learner, train, compile=compiled, **OPTIONS)
    return learner.trainable_state()


@pytest.fixture(autouse=True)
def fresh_graphs() -> None:
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for processors with g++")
@pytest.mark.parametrize("name", ["coop", "vpt"])
def test_compiled_training_learns_the_same(name: str) -> None:
    plain = learned(name, False)
    for key, value in learned(name, True).items():
        torch.testing.assert_close(value, plain[key], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_without_a_compiler_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("/nowhere/c++",))
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    plain = learned("coop", False)
    with caplog.at_level(logging.WARNING):
        states = learned("coop", True)
    assert "train.compile has no effect here" in caplog.text
    for key, value in states.items():
        assert torch.equal(value, plain[key])


def test_the_first_loss_is_the_module_s_own() -> None:
    backbone = vlprompt.create_backbone("tiny")
    learner = vlprompt.create_learner("coop", backbone, ["circle", "square"])
    batch = {"embedding": torch.randn(2, backbone.dim), "label": torch.tensor([0, 1])}
    torch.testing.assert_close(CompiledLoss(learner)(batch), learner.loss(batch), rtol=0, atol=0)
